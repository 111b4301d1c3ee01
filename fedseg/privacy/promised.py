"""What a plan's noise gives over its whole schedule, and what a study that was run has spent.

A plan says its noise itself, so that everybody can hold it against its promise: whoever shows,
approves or runs a private plan asks here first. Training patients and held-back patients are
different people, each with a guarantee of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from fedseg.errors import PlanError, PrivacyError
from fedseg.plan import StudyPlan
from fedseg.privacy.accounting import state
from fedseg.privacy.guarantee import Guarantee, rounded_up
from fedseg.privacy.mechanisms import Mechanism
from fedseg.privacy.schedule import allowed, done, mechanism_of
from fedseg.privacy.words import not_covered
from fedseg.promise import LocalPrivacy
from fedseg.result import GuaranteeRecord, StageRecord

_NOTHING = "Nothing was trained, so nothing was spent."


@dataclass(frozen=True)
class Promised:
    """What the noise of a plan gives once all its rounds are done.

    Attributes:
        train: to each training patient.
        held_back: to each held-back patient; None where no number about them leaves with noise.
    """

    train: Guarantee
    held_back: Guarantee | None


def promised(plan: StudyPlan) -> Promised:
    """The guarantee that a private plan's own noise gives, whatever it promises.

    Raises:
        PlanError: the plan has no guarantee, or was not built.
        PrivacyError: the accountants do not agree on it.
    """
    privacy = _promise(plan)
    found = {each.use: state([each.mechanism], privacy.delta) for each in allowed(plan)}
    return Promised(found["train"], found.get("val"))


def require_kept(plan: StudyPlan) -> Promised:
    """Accept a private plan whose noise keeps what it promises.

    Raises:
        PlanError: the plan has no guarantee, or was not built.
        PrivacyError: the noise is weaker than the promise needs.
    """
    privacy, found = _promise(plan), promised(plan)
    for what, each in (("training", found.train), ("metrics", found.held_back)):
        if each is not None and each.epsilon > privacy.epsilon:
            raise PrivacyError(
                f"the plan promises epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for "
                f"each patient, but its noise for {what} gives {rounded_up(each.epsilon)}: run "
                "`fedseg plan build`, which finds the noise that keeps the promise"
            )
    if privacy.outputs.metrics == "noised" and found.held_back is None:
        raise PrivacyError(
            "the plan releases metrics with noise and names none for them: run `fedseg plan build`"
        )
    return found


def record_of(
    plan: StudyPlan, stages: Sequence[StageRecord], *, private: bool = True
) -> GuaranteeRecord | None:
    """What a study that was run guaranteed, for its result; None where the plan has no guarantee.

    A round that was tried again counts once: a hospital gives the answer again that it stored. One
    that nobody answered counts, too: hospitals pay before they work.

    Args:
        stages: the study's history.
        private: False where the noise was seeded.

    Raises:
        PlanError: the plan was not built.
        PrivacyError: the accountants do not agree.
    """
    if plan.private is None:
        return None
    privacy = plan.private
    asked = dict.fromkeys((record.round, record.stage) for record in stages)
    names = [stage for _, stage in asked]
    train = _stated(done(plan, names), privacy, private)
    held_back = None
    if privacy.outputs.metrics == "noised":
        releases = names.count("evaluate")
        one = mechanism_of(plan, "val")
        work = (one.model_copy(update={"steps": releases}),) if releases else ()
        held_back = _stated(work, privacy, private)
    return GuaranteeRecord(
        private=private,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        epsilon_spent=_up(train),
        epsilon_held_back=_up(held_back) if privacy.outputs.metrics == "noised" else None,
        noise_multiplier=plan.noise.training,
        text=_text(plan, train, held_back, private),
    )


def _text(
    plan: StudyPlan, train: Guarantee | None, held_back: Guarantee | None, private: bool
) -> str:
    """The record's guarantee in full; of a seeded run what it is not."""
    privacy = _promise(plan)
    rows = [train.text if train else _NOTHING]
    if not private and train:
        rows.append(
            f"With secret noise the same run would have spent epsilon {rounded_up(train.epsilon)} "
            f"at delta {privacy.delta:g} for each training patient."
        )
    elif held_back:
        rows.append("\nHeld-back patients, whose metrics left with noise:\n\n" + held_back.text)
    if private:
        rows.append(f"\nBesides:     {not_covered(plan)}")
    return "\n".join(rows)


def _stated(work: Sequence[Mechanism], privacy: LocalPrivacy, private: bool) -> Guarantee | None:
    """The guarantee of what was done; None where nothing was."""
    return replace(state(work, privacy.delta), private=private) if work else None


def _up(guarantee: Guarantee | None) -> float:
    """An epsilon to four decimals, rounded up."""
    return ceil(guarantee.epsilon * 1e4 - 1e-6) / 1e4 if guarantee else 0.0


def _promise(plan: StudyPlan) -> LocalPrivacy:
    """The plan's guarantee."""
    if plan.private is None:
        raise PlanError("the plan has no privacy guarantee (privacy.guarantee: none)")
    return plan.private
