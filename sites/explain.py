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
from fedseg.privacy.words import in_one_line
from sites.outgoing import leaves
from sites.pledge import guaranteed
from sites.policy import Rule, own_model_line
from sites.wording import duration, listed, times

if TYPE_CHECKING:
    from fedseg.security.identity import Bundle, Roll
    from sites.approval import Approval, CohortRecord

_PARTS = {
    "all": "all are trained",
    "norms": "those of the norm layers alone are trained",
    "head": "those of the last layer alone are trained",
    "norms+head": "those of the norm layers and of the last layer alone are trained",
    "adapters": "those of small added layers (adapters) alone are trained",
    "norms+adapters": "those of the norm layers and of small added layers alone are trained",
    "adapters+head": "those of the last layer and of small added layers alone are trained",
    "norms+adapters+head": "those of the norm layers, of the last layer and of small added layers "
    "alone are trained",
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
        Section("What leaves the hospital", leaves(plan, situation.record)),
        Section("The privacy guarantee", guaranteed(plan, situation.record)),
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
        f"{listed(list(plan.task.labels))} in {_images(plan)}. Images stay in each hospital; what "
        "the model learnt from them is sent to the coordinator, who combines it.",
        f"Privacy guarantee: {in_one_line(plan)}",
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
        f"The model: {plan.model.network}, {plan.task.dimensions}-D, {parameters:,} numbers, of "
        f"which {_PARTS[training.trainable]}. In each of {rounds} rounds it is trained here in "
        f"{training.steps_per_round} steps of {_step(plan)} of {times(plan.task.patch_size)} "
        f"points at a spacing of {times(plan.task.spacing_mm)} mm.",
        "Prepared copies of the images are kept in the cache folder of this site, readable by its "
        "own user only. Nothing is written into the data folder. Only software that this hospital "
        "installed touches images.",
    )


def _step(plan: StudyPlan) -> str:
    """Whose image patches are in one step."""
    if plan.private is None:
        return f"{plan.training.batch_size} image patches"
    patches = plan.private.patches_per_patient
    who = "every patient" if plan.private.rate == 1 else "each patient that was drawn by lot"
    return f"{patches} image patches of {who}"


def _learnt(plan: StudyPlan, sites: int) -> tuple[str, ...]:
    """What each party could find out."""
    alone = (
        " As long as there are two of you, the other one can work out your updates exactly."
        if sites <= 2
        else ""
    )
    coordinator = (
        "The coordinator reads every update of this hospital and knows whose it is: it could "
        "attempt the above. It also chooses the models that are sent; one that is dishonest could "
        "choose them so that updates tell more."
    )
    later = (
        "Whoever holds the final model later: perhaps whether a person was trained on, and what "
        "the model has memorised."
    )
    if plan.private:
        coordinator = (
            "The coordinator reads every update of this hospital and knows whose it is. Whatever "
            "it does with them, and whichever models it sends, the guarantee bounds what it finds "
            "out about any one patient. It learns what is true of your patients as a whole."
        )
        later = "Whoever holds the final model later: the guarantee bounds that likewise."
        alone += " The guarantee bounds what that tells of any one patient."
    return (
        coordinator,
        f"The other hospitals ({max(sites - 1, 0)} so far) get the common model of every round, "
        f"{_passed_on(plan)} What they can draw from the common model concerns all the others "
        f"together; the fewer take part, the more it is about you.{alone}",
        "Who carries the messages (network, proxy, Flower's server): that this hospital takes "
        "part, when, and how large messages are. The content is sealed between trainer and "
        "coordinator.",
        later,
    )


def _passed_on(plan: StudyPlan) -> str:
    """Whether the other hospitals get something that is of this hospital alone."""
    if not plan.evaluation.own_models:
        return "not your updates."
    meaning = (
        "They may then attempt what the coordinator may."
        if plan.private is None
        else "The guarantee covers it as it does your updates."
    )
    return (
        f"not your updates; but with {own_model_line(plan)}: true in this hospital's policy.yaml "
        "they get your own model of the last round, and can work out your last update from it. "
        f"{meaning}"
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
    if plan.evaluation.own_models:
        longest += timeout * len(roll.sites)
    return (
        f"{plan.aggregation.rounds} rounds; the coordinator waits at most {duration(timeout)} for "
        f"the answers of each step, so at most {duration(longest)} of work in all, mostly far "
        "less. Pauses are not counted.",
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
