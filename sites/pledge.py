"""What a plan guarantees to patients, for those who must answer for it: in words, then exactly.

The epsilon is not the plan's own claim: the plan's noise is counted here, by the hospital's own
software, and held against the promise.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from fedseg.errors import PlanError, PrivacyError
from fedseg.plan import StudyPlan
from fedseg.privacy.words import guessed_right, not_covered
from fedseg.promise import LocalPrivacy
from sites.wording import duration

if TYPE_CHECKING:
    from fedseg.privacy.guarantee import Guarantee
    from sites.approval import CohortRecord

STRONG, MIDDLING = 1.0, 3.0


def guaranteed(plan: StudyPlan, record: CohortRecord | None) -> tuple[str, ...]:
    """What the guarantee says, of whom, under which assumptions, and what it does not say.

    Args:
        record: the frozen cohort, or None where none is chosen.
    """
    privacy = plan.private
    if privacy is None:
        return (
            "This plan has NO privacy guarantee. From an update one may reconstruct images that "
            "were trained on, or tell whether a certain person's images were among them; research "
            "has shown both, most easily with few patients, small batches and early rounds. "
            "Whether updates are personal data is for your data protection officer to judge; "
            "assume that they are.",
        )
    return (
        f"Differential privacy with epsilon {privacy.epsilon:g} and delta {privacy.delta:g} for "
        "each patient of this hospital, over the whole study.",
        _in_words(privacy),
        _delta(privacy, record),
        "The unit is the patient: all images, slices, patches and augmentations of a person count "
        "as one. Compared are two cohorts, one of which has one patient more.",
        _drawn(privacy),
        "The noise is this hospital's own, made here from the operating system's secret random "
        "numbers, and in the update before it leaves: nobody else need be trusted for it.",
        *_counted(plan, privacy),
        _updates_cover(plan),
        _uncovered(plan, privacy),
        "Before each round its cost is written into this hospital's ledger, for each patient; a "
        "crash leaves the debit. Once the plan's rounds are used up nothing more is trained, "
        "whatever the coordinator asks; `fedseg-site ledger show` and `budget` tell what was spent "
        "and what is left over all studies.",
        "Whether protected updates are still personal data is for your data protection officer to "
        "judge: the guarantee is a statement of mathematics, not of law.",
    )


def _in_words(privacy: LocalPrivacy) -> str:
    """What epsilon and delta bound, and how strong that is."""
    strength = (
        "That is a strong promise."
        if privacy.epsilon <= STRONG
        else "That is a middling promise."
        if privacy.epsilon <= MIDDLING
        else "For the worst case that is a weak promise: it does not rule out such a guess. Known "
        "attacks on trained models stay far below it, which nobody guarantees."
    )
    return (
        "In words: somebody who knows everything else, all other patients included, sees every "
        "update and every model, and must tell whether a certain patient was among those trained "
        f"on, is right in at most {100 * guessed_right(privacy):.1f} of 100 cases; blind guessing "
        f"is right in 50. {strength} A smaller epsilon protects better and costs quality."
    )


def _delta(privacy: LocalPrivacy, record: CohortRecord | None) -> str:
    """What delta leaves open, and whether it is small enough for this cohort."""
    line = (
        f"Delta is what this leaves open: with a chance of up to 1 in {round(1 / privacy.delta):,} "
        "the factor of epsilon may not hold for a patient. It is counted in the figure above and "
        "must be below one over the number of patients"
    )
    patients = max(record.patients.values(), default=0) if record else 0
    if not patients:
        return f"{line}."
    if privacy.delta * patients >= 1:
        return f"{line}, which it is NOT for your {patients}: the plan cannot be approved."
    return f"{line}, as it is for your {patients}."


def _drawn(privacy: LocalPrivacy) -> str:
    """What is assumed of the draw of patients."""
    if privacy.rate == 1:
        return "Every training patient is in every step; nothing is assumed of a draw by lot."
    return (
        f"In each step each training patient is drawn by lot with probability {privacy.rate:g}, "
        "independently of the others, secretly and anew; the figure counts on that. A step in "
        "which nobody was drawn is answered with noise like any other."
    )


def _counted(plan: StudyPlan, privacy: LocalPrivacy) -> tuple[str, ...]:
    """What the plan's noise gives, counted at this hospital."""
    from fedseg.privacy.promised import promised, require_kept

    try:
        given = promised(plan)
    except (PlanError, PrivacyError) as error:
        return (f"WHAT THE NOISE GIVES IS NOT KNOWN: {error}. The plan cannot be approved.",)
    noise = plan.noise
    lines = [
        f"For training patients the noise is {noise.training:.4g} times the most that one patient "
        f"can add ({privacy.clip_norm:g}), in each of {_steps(given.train):,} steps. Counted here, "
        f"that gives epsilon {_up(given.train.epsilon)} at delta {privacy.delta:g} (two methods "
        f"of accounting agree; a coarser third one says {_up(given.train.rdp_epsilon)})."
    ]
    if given.held_back is not None and noise.metrics is not None:
        lines.append(
            "Held-back patients are other people: their quality figures leave with noise of "
            f"{noise.metrics:.4g} times the most that one patient can add, "
            f"{_steps(given.held_back):,} times, which gives epsilon "
            f"{_up(given.held_back.epsilon)} at delta {privacy.delta:g} for each of them."
        )
    try:
        require_kept(plan)
    except PrivacyError as error:
        lines.append(f"THE NOISE IS TOO WEAK: {error}. The plan cannot be approved as it is.")
    return tuple(lines)


def _updates_cover(plan: StudyPlan) -> str:
    """What the guarantee is about."""
    metrics = " and quality figures" if plan.privacy.outputs.metrics == "noised" else ""
    return (
        f"Covered: all numbers that leave in updates{metrics}, all models that are made from them, "
        "and whatever anyone computes from these, at any time and with any other knowledge."
    )


def _uncovered(plan: StudyPlan, privacy: LocalPrivacy) -> str:
    """What it does not say."""
    when = (
        "when answers leave (fixed: "
        f"{duration(privacy.release_after_s)} after the task; an answer that takes longer is late)"
        if privacy.release_after_s
        else "how long answers take (the plan does not fix when they leave)"
    )
    return (
        "Not covered: a patient who is known to another hospital of the study, too (each "
        "guarantees for its own, and the two epsilons add up); relatives, and what is true of all "
        f"patients alike; {when}; that this hospital takes part, and when. {not_covered(plan)}"
    )


def _steps(guarantee: Guarantee) -> int:
    """How many releases a guarantee is about."""
    return sum(each.steps for each in guarantee.mechanisms)


def _up(epsilon: float) -> str:
    """An epsilon to three decimals, never rounded down."""
    return f"{ceil(epsilon * 1000 - 1e-6) / 1000:g}"
