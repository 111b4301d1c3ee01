"""Noised metrics under attack: did a worst-case patient take part in the held-back cohort?

Many studies are run, each with a cohort of ordinary held-back patients that the adversary knows. In
half of them, by fair coins, one more is among them whose scores are far above anything that a
patient can have, so that only the clip keeps it to its share. Every evaluation of the study is
released by `noised_means`, as a trainer does it. The adversary takes the known patients away and
adds up what is left along the one direction in which that patient can be seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, sqrt

import numpy as np

from fedseg.arrays import seed_for
from fedseg.errors import PlanError
from fedseg.evaluation.private import noised_means
from fedseg.learning.private import promise_of
from fedseg.plan import StudyPlan
from fedseg.privacy.accounting import epsilon_spent
from fedseg.privacy.audit.bounds import Bound, Floats, llr, of_schedule
from fedseg.privacy.audit.canaries import Source, Transcript
from fedseg.privacy.audit.checks import Check, noise_check
from fedseg.privacy.mechanisms import Mechanism
from fedseg.privacy.noise import Noise
from fedseg.privacy.schedule import allowed
from fedseg.result import PatientScores

BEYOND = 1e6  # a score that no patient can have
_ROOM = 5  # standard deviations on either side before the released means are cut off at 0 and 1


@dataclass(frozen=True)
class MetricsAudit:
    """What studies released about the patient.

    Attributes:
        accounted: the epsilon of all evaluations of a study by the accountant.
        bound: on it, from below.
        check: of the noise by itself.
    """

    accounted: float
    bound: Bound
    check: Check


def metrics_audited(
    plan: StudyPlan, studies: int, seed: int, confidence: float, *, source: Source | None = None
) -> MetricsAudit | None:
    """Attack the noised metrics of a plan; None where it releases none.

    Args:
        plan: private and built; its noise, metrics, labels and evaluations are used as they are.
            The declared number of patients, which scales what is released, is set so large that
            hardly anything is cut off at 0 or 1.
        studies: in the hundreds at least; see the bound's ceiling.
        seed: decides in which the patient takes part.
        confidence: of the bound, such as 0.95.
        source: of noise, by purpose; seeded where it is not said.

    Raises:
        PlanError: the plan has no guarantee, or was not built.
    """
    if plan.noise.metrics is None:
        return None
    work = _evaluations(plan)
    seen = metrics_transcript(plan, studies, seed, source=source)
    delta = promise_of(plan).delta
    check = noise_check(seen, plan.noise.metrics)
    what = "standard deviation of the noise on metrics, over what one patient can change"
    return MetricsAudit(
        epsilon_spent([work], delta),
        of_schedule(llr(seen.values, 1.0), seen.members, work, delta, confidence),
        replace(check, what=what),
    )


def metrics_transcript(
    plan: StudyPlan, studies: int, seed: int, *, source: Source | None = None
) -> Transcript:
    """Run the evaluations of many studies; the arguments are those of `metrics_audited`.

    Returns:
        about each study what a canary's transcript has: values are 1 where the patient took part,
        0 where not, and noise of the plan's multiplier.
    """
    steps = _evaluations(plan).steps
    plan, known = _roomy(plan)
    members = np.random.default_rng(seed_for(seed, "", 0, "audit metrics")).random(studies) < 0.5
    values = np.empty((steps, studies))
    ordinary, patient = [_scores(plan, 1.0)] * known, _scores(plan, BEYOND)
    for study, inside in enumerate(members):
        purpose = f"audit metrics {study}"
        noise = source(purpose) if source else Noise.seeded(seed, purpose)
        cohort = [*ordinary, patient] if inside else ordinary
        for step in range(steps):
            values[step, study] = float(np.mean(_totals(cohort, plan, noise))) - known
    return Transcript(values, members, np.zeros(studies, np.int64), ("metrics",))


def _totals(cohort: list[PatientScores], plan: StudyPlan, noise: Noise) -> Floats:
    """The noisy sums that are released, before they were divided."""
    promise = promise_of(plan)
    assert promise.expected_validation is not None  # `_roomy` says one
    released = noised_means(cohort, plan, noise)
    numbers = [list(scores.values()) for scores in released.values()]
    return np.array(numbers, float) * promise.expected_validation


def _roomy(plan: StudyPlan) -> tuple[StudyPlan, int]:
    """The plan with room for noise on both sides, and how many ordinary patients lie between."""
    if plan.noise.metrics is None:
        raise PlanError("the plan does not release noised metrics")
    numbers = len(plan.evaluation.metrics) * len(plan.task.labels)
    known = max(1, ceil(_ROOM * plan.noise.metrics * sqrt(numbers)))
    changed = {"expected_validation": 2 * known}
    return plan.model_copy(update={"privacy": promise_of(plan).model_copy(update=changed)}), known


def _scores(plan: StudyPlan, value: float) -> PatientScores:
    """A patient with this value of every metric and label."""
    every = dict.fromkeys(plan.task.labels, value)
    return PatientScores(
        site="audit", patient="made up", cases=1, dice=every, hd95_mm=every, nsd=every
    )


def _evaluations(plan: StudyPlan) -> Mechanism:
    """All evaluations of a study."""
    found = [each.mechanism for each in allowed(plan) if each.use == "val"]
    if not found:
        raise PlanError("the plan does not release noised metrics")
    return found[0]
