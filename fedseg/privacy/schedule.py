"""What a private plan does to patients in all, and how much noise that takes.

One training step is one release of a clipped sum over training patients; one evaluation is one
release of a clipped sum over held-back patients. The two are different people, so each keeps the
plan's epsilon by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedseg.aggregation.rounds import schedule
from fedseg.errors import PlanError
from fedseg.plan import StudyPlan
from fedseg.privacy.accounting import calibrate
from fedseg.privacy.mechanisms import Allowed, Mechanism, Use
from fedseg.promise import Calibration, LocalPrivacy


def calibrated(plan: StudyPlan) -> Calibration | None:
    """The least noise that keeps a plan's promise over all its rounds; None without a promise.

    Raises:
        PrivacyError: no noise is enough.
    """
    privacy = plan.private
    if privacy is None:
        return None
    training = calibrate(privacy.epsilon, privacy.delta, [(privacy.rate, _steps(plan))])
    metrics = None
    if privacy.outputs.metrics == "noised":
        metrics = calibrate(privacy.epsilon, privacy.delta, [(1.0, _evaluations(plan))])
    return Calibration(training=training, metrics=metrics)


def allowed(plan: StudyPlan) -> tuple[Allowed, ...]:
    """A private plan's whole schedule, for the ledger's register.

    Raises:
        PlanError: the plan has no guarantee, or was not built.
    """
    found = [Allowed(use="train", mechanism=_mechanism(plan, "train", _steps(plan)))]
    if plan.noise.metrics is not None:
        found.append(Allowed(use="val", mechanism=_mechanism(plan, "val", _evaluations(plan))))
    return tuple(found)


def mechanism_of(plan: StudyPlan, use: Use) -> Mechanism:
    """What one task of a private plan does: a round of training steps, or one evaluation.

    Raises:
        PlanError: the plan does not release that, or was not built.
    """
    return _mechanism(plan, use, plan.training.steps_per_round if use == "train" else 1)


def done(plan: StudyPlan, stages: Sequence[str]) -> tuple[Mechanism, ...]:
    """What these stages (`train`, `evaluate`) of a private plan did to training patients."""
    count = sum(stage == "train" for stage in stages)
    steps = count * plan.training.steps_per_round
    return (_mechanism(plan, "train", steps),) if steps else ()


def _mechanism(plan: StudyPlan, use: Use, steps: int) -> Mechanism:
    """So many releases of one kind."""
    noise = plan.noise.training if use == "train" else plan.noise.metrics
    if noise is None:
        raise PlanError("the plan does not release noised metrics")
    return Mechanism(
        noise_multiplier=noise,
        rate=_promise(plan).rate if use == "train" else 1.0,
        steps=steps,
    )


def _promise(plan: StudyPlan) -> LocalPrivacy:
    """The plan's guarantee."""
    if plan.private is None:
        raise PlanError("the plan has no guarantee: nothing is charged for it")
    return plan.private


def _steps(plan: StudyPlan) -> int:
    """Training steps of the whole study."""
    return plan.aggregation.rounds * plan.training.steps_per_round


def _evaluations(plan: StudyPlan) -> int:
    """Evaluations of the whole study."""
    return sum(stage == "evaluate" for _, stage in schedule(plan))
