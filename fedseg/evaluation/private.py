"""A model measured on held-back patients under a guarantee for each of them.

Each patient's metrics are one vector of numbers in [0, 1], so of norm at most the square root of
how many they are. Their sum gets Gaussian noise and is divided by a number of patients that the
plan declares: what leaves is not the mean where that number is not the true one. A metric that a
patient does not have (a label that is neither in the truth nor in the prediction) counts as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedseg.errors import PlanError
from fedseg.evaluation.evaluate import evaluate_cohort
from fedseg.imaging.cases import Cohort
from fedseg.plan import StudyPlan
from fedseg.privacy.noise import Noise
from fedseg.result import PatientScores, Scores

if TYPE_CHECKING:
    from fedseg.imaging.cache import CaseCache


def measurable(
    network: nn.Module, cohort: Cohort, cache: CaseCache, plan: StudyPlan
) -> list[PatientScores]:
    """The plan's metrics of each patient who can be measured; the others are passed over.

    No error comes from one patient's data, since an error would leave.
    """
    found: list[PatientScores] = []
    for _, cases in cohort.by_patient():
        alone = Cohort(cohort.site, cases, cohort.label_map)
        try:
            found += evaluate_cohort(network, alone, cache, plan, plan.evaluation.metrics)
        except Exception:
            continue
    return found


def noised_means(
    patients: Sequence[PatientScores],
    plan: StudyPlan,
    noise: Noise,
    annotated: Sequence[str] | None = None,
) -> dict[str, Scores]:
    """Metric -> label -> noisy sum over the patients, over `expected_validation`.

    Args:
        patients: each once; metrics are clipped to [0, 1].
        plan: private and built; its metrics leave noised.
        noise: fresh for this release; a seeded one gives no privacy.
        annotated: names of the labels that the site declares to annotate; None is all of them.

    Returns:
        every metric and label of the plan, clipped to [0, 1] after the noise; None for labels that
        the site does not annotate, which depends on no patient.

    Raises:
        PlanError: the plan does not release noised metrics.
    """
    promise, multiplier = plan.private, plan.noise.metrics
    if promise is None or multiplier is None or promise.expected_validation is None:
        raise PlanError("the plan does not release noised metrics")
    metrics, labels = plan.evaluation.metrics, sorted(plan.task.labels)
    shape = (len(metrics), len(labels))
    total = np.zeros(shape)
    for patient in patients:
        total += _vector(patient, plan, labels)
    total += noise.gaussian(shape, multiplier * sqrt(shape[0] * shape[1]))
    means = np.clip(total / promise.expected_validation, 0.0, 1.0)
    return {
        metric: {
            label: mean if annotated is None or label in annotated else None
            for label, mean in zip(labels, row, strict=True)
        }
        for metric, row in zip(metrics, means.tolist(), strict=True)
    }


def _vector(patient: PatientScores, plan: StudyPlan, labels: Sequence[str]) -> NDArray[np.float64]:
    """One patient's (metrics, labels), each in [0, 1]."""
    values = [
        [_in_range(patient.of(metric).get(label)) for label in labels]
        for metric in plan.evaluation.metrics
    ]
    return np.array(values)


def _in_range(value: float | None) -> float:
    """A metric in [0, 1]; 0 where there is none."""
    return min(max(value, 0.0), 1.0) if value is not None and isfinite(value) else 0.0
