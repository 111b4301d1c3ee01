"""A plan in the words of those who must answer for it: lawyers, radiologists, the data officer.

What is trained on which data, what leaves and how often, who could learn what, who takes part, for
how long, and which of the hospital's own rules apply. Every number comes from the plan, the list of
sites or the frozen cohort; nothing is promised that the code does not keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from fedseg.aggregation.rounds import schedule
from fedseg.plan import StudyPlan
from sites.policy import Rule

if TYPE_CHECKING:
    from fedseg.security.identity import Bundle, Roll
    from sites.approval import Approval, CohortRecord

FEW_PATIENTS = 5
_METRICS = {
    "dice": "Dice overlap",
    "hd95": "95th percentile surface distance in mm",
    "nsd": "surface overlap within a tolerance",
}


@dataclass(frozen=True)
class Section:
    """A heading and its paragraphs."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Situation:
    """What a hospital knows of a study.

    Attributes:
        bundle: as it was pinned.
        roll: the sites as they would be approved now.
        added: sites of it that an earlier approval does not cover.
        approval: what is approved, or None.
        record: the frozen cohort, or None.
        rules: the hospital's own, held against the plan.
    """

    bundle: Bundle
    roll: Roll
    added: tuple[str, ...]
    approval: Approval | None
    record: CohortRecord | None
    rules: tuple[Rule, ...]


def explain(situation: Situation) -> tuple[Section, ...]:
    """Everything that a hospital should know before it approves."""
    plan = situation.bundle.plan
    return (
        Section("In short", _in_short(situation)),
        Section("What is trained, on which data", _trained(plan, situation.record)),
        Section("What leaves the hospital", _leaves(plan, situation.record)),
        Section("Who could learn what", _learnt(plan, len(situation.roll.sites))),
        Section("Who takes part", _parties(situation)),
        Section("How long", _duration(plan, situation.roll)),
        Section("Rules of this hospital (policy.yaml)", _ruled(situation.rules)),
        Section("What this hospital can do at any time", _means(plan.study)),
    )


def _in_short(situation: Situation) -> tuple[str, ...]:
    """One sentence, and where the approval stands."""
    plan, approval = situation.bundle.plan, situation.approval
    forbidden = [rule.name for rule in situation.rules if rule.broken]
    if approval is None:
        state = "Not approved: nothing is trained and nothing leaves."
    elif approval.plan != plan.digest:
        state = "Another plan was approved before; this one is not: nothing is trained."
    else:
        state = f"Approved on {approval.when} by {approval.by}."
        if situation.added:
            state += " Sites were added since; until you approve again, nothing more is trained."
    if forbidden:
        state += f" Forbidden by this hospital's policy: {', '.join(forbidden)}."
    return (
        f"The hospitals of the study {plan.study} train one computer model together that marks "
        f"{_listed(list(plan.task.labels))} in {_images(plan)}. Images stay in each hospital; what "
        "the model learnt from them is sent to the coordinator, who combines it.",
        state,
        f"Digest of the plan, which is what you approve: {plan.digest}",
    )


def _trained(plan: StudyPlan, record: CohortRecord | None) -> tuple[str, ...]:
    """Data, network and rounds."""
    parameters = sum(prod(spec.shape) for spec in plan.built.tensors)
    training, rounds = plan.training, plan.aggregation.rounds
    used = (
        "The data are chosen when you approve, with --data: your patients with these images and "
        "with drawn labels."
        if record is None
        else f"Chosen data: {record.patients.get('train', 0)} patients to train on, "
        f"{record.patients.get('val', 0)} held back to measure, {record.patients.get('test', 0)} "
        f"kept for a last test; {record.left_out} images of this hospital left out as unusable."
    )
    return (
        used,
        f"The model: {plan.model.network}, {plan.task.dimensions}-D, {parameters:,} numbers. In "
        f"each of {rounds} rounds it is trained here in {training.steps_per_round} steps of "
        f"{training.batch_size} image patches of {_times(plan.task.patch_size)} points at a "
        f"spacing of {_times(plan.task.spacing_mm)} mm.",
        "Prepared copies of the images are kept in the cache folder of this site, readable by its "
        "own user only. Nothing is written into the data folder. Only software that this hospital "
        "installed touches images.",
    )


def _leaves(plan: StudyPlan, record: CohortRecord | None) -> tuple[str, ...]:
    """Every kind of message, how often, how large."""
    update, stages = plan.built.nbytes, [stage for _, stage in schedule(plan)]
    rounds, attempts = stages.count("train"), plan.aggregation.attempts
    measured = stages.count("evaluate")
    metrics = _listed([_METRICS.get(name, name) for name in plan.evaluation.metrics])
    held_back = record.patients.get("val", 0) if record else None
    few = (
        f" Only {held_back} of your patients are held back: such a mean says much of each of them."
        if held_back is not None and 0 < held_back < FEW_PATIENTS
        else " With very few patients held back, a mean says much of each of them."
    )
    return (
        "At the start, and whenever the study is taken up again: how many patients and images this "
        "hospital brings to each part, and how many images were left out.",
        f"{_times_said(rounds)}, once a round: an update, which is the change of every number of "
        f"the model, {_size(update)}; with it the number of patients trained on, the number of "
        f"steps and the mean training error. A round that fails may be asked again, so at most "
        f"{rounds * attempts} different updates ({attempts} a round).",
        f"{_times_said(measured)}: the quality of the common model on your held-back patients, "
        f"as means for each label ({metrics}), and the number of those patients.{few}",
        "At the end: that the final model has arrived. In place of any of these: one word that "
        "says why a task was refused.",
        "With each message: this hospital's name and signature, and the time. No image, no drawn "
        "label, no file name, no name or number of a patient.",
        f"In all about {_size(rounds * update)} leave (at most "
        f"{_size(rounds * attempts * update)}) and about "
        f"{_size((rounds + measured + 1) * update)} come in.",
    )


def _learnt(plan: StudyPlan, sites: int) -> tuple[str, ...]:
    """What each party could find out."""
    assert plan.privacy.guarantee == "none"
    alone = (
        " As long as there are two of you, the other one can work out your updates exactly."
        if sites <= 2
        else ""
    )
    return (
        "This plan has NO privacy guarantee. From an update one may reconstruct images that were "
        "trained on, or tell whether a certain person's images were among them; research has shown "
        "both, most easily with few patients, small batches and early rounds. Whether updates are "
        "personal data is for your data protection officer to judge; assume that they are.",
        "The coordinator reads every update of this hospital and knows whose it is: it could "
        "attempt the above. It also chooses the models that are sent; one that is dishonest could "
        "choose them so that updates tell more.",
        f"The other hospitals ({max(sites - 1, 0)} so far) get the common model of every round, "
        "not your updates. What they can draw from it concerns all the others together; the fewer "
        f"take part, the more it is about you.{alone}",
        "Who carries the messages (network, proxy, Flower's server): that this hospital takes "
        "part, when, and how large messages are. The content is sealed between trainer and "
        "coordinator.",
        "Whoever holds the final model later: perhaps whether a person was trained on, and what "
        "the model has memorised.",
    )


def _parties(situation: Situation) -> tuple[str, ...]:
    """Coordinator and sites with fingerprints."""
    bundle, roll = situation.bundle, situation.roll
    lines = [
        f"Coordinator at {bundle.address}; fingerprint of the study: {bundle.fingerprint}",
        f"List of sites, version {roll.version}, compare by telephone whom you do not know:",
    ]
    for site in roll.sites:
        note = " (this hospital)" if site.name == bundle.site else ""
        note += " NEW since your approval" if site.name in situation.added else ""
        lines.append(f"  {site.name}{note}: {site.fingerprint}")
    if situation.approval is not None and situation.approval.any_later_sites:
        lines.append("Sites that are added later need no approval of yours (--any-later-sites).")
    else:
        lines.append("Should a site be added, training stops here until you approve the new list.")
    return tuple(lines)


def _duration(plan: StudyPlan, roll: Roll) -> tuple[str, ...]:
    """The longest that it can take, and until when the list holds."""
    timeout, attempts = plan.aggregation.round_timeout_s, plan.aggregation.attempts
    longest = sum(timeout * (attempts if stage == "train" else 1) for _, stage in schedule(plan))
    return (
        f"{plan.aggregation.rounds} rounds; the coordinator waits at most {_time(timeout)} for the "
        f"answers of each step, so at most {_time(longest)} of work in all, mostly far less. "
        "Pauses are not counted.",
        f"The list of sites holds until {roll.valid_until}: after that no task is accepted.",
    )


def _ruled(rules: tuple[Rule, ...]) -> tuple[str, ...]:
    """Each rule and what it says of this plan."""
    return tuple(
        f"{rule.name}: {rule.says}. "
        + (f"FORBIDS THIS: {rule.broken}." if rule.broken else "Kept.")
        for rule in rules
    )


def _means(study: str) -> tuple[str, ...]:
    """Pause, refuse, leave."""
    return (
        f"`fedseg-site pause` and `resume`; `fedseg-site plan refuse {study}` takes the approval "
        f"back; `fedseg-site leave {study}` ends taking part. What has been sent cannot be called "
        "back, and the common model keeps what it has learnt.",
        "`fedseg-site audit show` lists everything that was asked and sent.",
    )


def _images(plan: StudyPlan) -> str:
    """Which images, such as 'MR images (T1w, FLAIR)'."""
    channels = plan.task.channels
    modalities = " and ".join(sorted({channel.modality for channel in channels}))
    return f"{modalities} images ({', '.join(channel.name for channel in channels)})"


def _listed(names: list[str]) -> str:
    """Words in a row."""
    shown = names[:12]
    if len(names) > len(shown):
        return f"{', '.join(shown)} and {len(names) - len(shown)} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _times(numbers: tuple[float, ...]) -> str:
    """Numbers with a cross between."""
    return " x ".join(f"{n:g}" for n in numbers)


def _times_said(number: int) -> str:
    """How often."""
    return "Once" if number == 1 else f"{number} times"


def _size(size: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


def _time(seconds: float) -> str:
    """Seconds for people."""
    for unit, factor in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.0f} seconds"
