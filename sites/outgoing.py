"""What leaves a hospital in a study, in plain words: every kind of message, how often, how large.

It follows the plan's `privacy.outputs`: a number that is withheld is not said to leave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedseg.aggregation.rounds import schedule
from fedseg.plan import StudyPlan
from fedseg.privacy.words import withheld
from sites.policy import own_model_line
from sites.wording import duration, listed, size, times_said

if TYPE_CHECKING:
    from sites.approval import CohortRecord

FEW_PATIENTS = 5
_METRICS = {
    "dice": "Dice overlap",
    "hd95": "95th percentile surface distance in mm",
    "nsd": "surface overlap within a tolerance",
}


def leaves(plan: StudyPlan, record: CohortRecord | None) -> tuple[str, ...]:
    """Every kind of message, how often, how large.

    Args:
        record: the frozen cohort, or None where none is chosen.
    """
    lines = [
        _enlisting(plan),
        _labels(plan, record),
        _updates(plan),
        *_scores(plan, record),
        *_own_models(plan),
        _last(plan),
    ]
    if plan.private:
        lines += _form(plan)
    lines.append(
        "With each message: this hospital's name and signature, and the time. No image, no drawn "
        "label, no file name, no name or number of a patient."
    )
    return (*lines, _in_all(plan))


def _enlisting(plan: StudyPlan) -> str:
    """What is said when sites enlist."""
    outputs = plan.privacy.outputs
    begin = "At the start, and whenever the study is taken up again:"
    said = "how many patients and images this hospital brings to each part"
    if outputs.counts == "none":
        return f"{begin} that this hospital is ready, and no number of patients or images."
    if outputs.counts == "suppressed":
        return f"{begin} {said}, {_many(plan)}; how many images were left out is not told."
    return f"{begin} {said}, and how many images were left out."


def _labels(plan: StudyPlan, record: CohortRecord | None) -> str:
    """What is said of the labels that are drawn here."""
    begin = "With it, which of the study's structures are drawn at this hospital"
    if record is None:
        return f"{begin}, as labels.yaml beside the data declares it: their names, no count."
    own = record.annotated
    if own is None:
        return f"{begin}: that all are ({listed(list(plan.task.labels))}), and no count of any."
    lacking = [name for name in plan.task.labels if name not in own]
    if not lacking:
        return f"{begin}: that all are ({listed(list(own))}), and no count of any."
    return (
        f"{begin}: {listed(list(own))}, and no count of any. So everybody in the study can see "
        f"that {listed(lacking)} is not drawn here; it is neither taught nor measured with your "
        "patients."
    )


def _updates(plan: StudyPlan) -> str:
    """What is sent after a round of training."""
    outputs, rounds = plan.privacy.outputs, plan.aggregation.rounds
    besides = []
    if outputs.counts != "none":
        besides.append("the number of patients trained on" + _where(plan, outputs.counts))
    besides.append("the number of steps")
    if outputs.losses != "none":
        besides.append("the mean training error" + _where(plan, outputs.losses))
    kept = [
        words
        for name, words in (
            ("counts", "how many patients were trained on"),
            ("losses", "the training error"),
        )
        if withheld(plan, name)
    ]
    line = (
        f"{times_said(rounds)}, once a round: an update, which is the change of {_changed(plan)}"
        f"{_noised(plan)}, {size(plan.built.update_nbytes)}; with it {listed(besides)}."
    )
    if kept:
        line += f" Not told: {listed(kept)}."
    return f"{line} {_again(plan)}"


def _changed(plan: StudyPlan) -> str:
    """The numbers that an update holds."""
    if plan.built.personal:
        return "every number of the model but those that stay here"
    if plan.built.frozen:
        return "every number of the model that is trained"
    return "every number of the model"


def _noised(plan: StudyPlan) -> str:
    """What an update is under a guarantee."""
    return ", with this hospital's own noise in it" if plan.private else ""


def _again(plan: StudyPlan) -> str:
    """How often there can be another update."""
    rounds, attempts = plan.aggregation.rounds, plan.aggregation.attempts
    if plan.private is None:
        return (
            f"A round that fails may be asked again, so at most {rounds * attempts} different "
            f"updates ({attempts} a round)."
        )
    return (
        "A round that fails may be asked again; then the stored answer leaves once more, the same "
        f"to the last bit. In all at most {rounds} different updates, whatever is asked: after "
        "that the hospital's ledger has nothing left for this study."
    )


def _scores(plan: StudyPlan, record: CohortRecord | None) -> tuple[str, ...]:
    """What is sent after measuring."""
    outputs = plan.privacy.outputs
    measured = sum(stage == "evaluate" for _, stage in schedule(plan))
    if outputs.metrics == "none":
        return (
            "The quality of the common model on your held-back patients is not measured for the "
            "study, and nothing about it leaves.",
        )
    names = listed([_METRICS.get(name, name) for name in plan.evaluation.metrics])
    number = ""
    if outputs.counts != "none":
        number = ", and the number of those patients" + _where(plan, outputs.counts)
    line = (
        f"{times_said(measured)}: the quality of the common model on your held-back patients, "
        f"as means for each label ({names})"
    )
    if outputs.metrics == "noised":
        return (f"{line}, each with noise that the guarantee counts{number}.",)
    if outputs.metrics == "suppressed":
        return (f"{line}, {_many(plan)}{number}.{_of_few(record, plan)}",)
    return (f"{line}{number}.{_of_few(record, plan)}",)


def _own_models(plan: StudyPlan) -> tuple[str, ...]:
    """What the consent to pass the own model on lets leave, and what is measured for others."""
    if not plan.evaluation.own_models:
        return ()
    return (
        "With the last update, only if this hospital's policy.yaml says "
        f"{own_model_line(plan)}: true by then: its "
        "signed consent that its own model, which is the last common model with that update in it, "
        "goes through the coordinator to every other hospital of the study, to be measured there. "
        "Without it your model is left out and the study goes on. What has left cannot be called "
        "back.",
        "For each hospital that consents: the quality of its own model on your held-back patients, "
        "as means in the same form and under the same conditions.",
    )


def _of_few(record: CohortRecord | None, plan: StudyPlan) -> str:
    """A warning that a mean over few patients is nearly each one's."""
    held_back = record.patients.get("val", 0) if record else None
    least = plan.privacy.outputs.suppress_below
    if plan.privacy.outputs.metrics == "suppressed" and held_back is not None:
        if held_back < least:
            return f" Only {held_back} of your patients are held back: these means do not leave."
        return ""
    if held_back is not None and 0 < held_back < FEW_PATIENTS:
        return f" Only {held_back} of your patients are held back: such a mean says much of each."
    return " With very few patients held back, a mean says much of each of them."


def _last(plan: StudyPlan) -> str:
    """What is sent at the end, and in place of an answer."""
    refused = (
        "one coarse word where a task was refused or failed, never what in the data caused it"
        if plan.private
        else "one word that says why a task was refused"
    )
    return f"At the end: that the final model has arrived. In place of any of these: {refused}."


def _form(plan: StudyPlan) -> tuple[str, ...]:
    """What the form and the time of an answer tell."""
    assert plan.private is not None
    held = plan.private.release_after_s
    when = (
        f"leaves {duration(held)} after its task came, however long the work took."
        if held
        else "leaves when it is ready: how long the work took may tell how many patients were in "
        "it. The plan does not fix when answers leave (privacy.release_after_s)."
    )
    return (
        f"All answers of one kind have the same length. An answer {when}",
        "With each answer a blinded digest of this hospital's ledger, which says nothing to others "
        "and comes back with the next task: so that a ledger that was put back is noticed.",
    )


def _in_all(plan: StudyPlan) -> str:
    """How much moves."""
    model, update = plan.built.nbytes, plan.built.update_nbytes
    stages = [stage for _, stage in schedule(plan)]
    rounds, measured = stages.count("train"), stages.count("evaluate")
    most = f" (at most {size(rounds * plan.aggregation.attempts * update)})"
    return (
        f"In all about {size(rounds * update)} leave{most} and about "
        f"{size((rounds + measured + 1) * model)} come in."
    )


def _where(plan: StudyPlan, openness: str) -> str:
    """A suppressed number's condition."""
    return f" ({_many(plan)})" if openness == "suppressed" else ""


def _many(plan: StudyPlan) -> str:
    """From how many patients on a suppressed number leaves."""
    return f"where they are at least {plan.privacy.outputs.suppress_below}"
