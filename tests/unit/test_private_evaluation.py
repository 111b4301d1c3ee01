"""Metrics with noise: what one patient can move, and what leaves."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from private_plans import private_plan

from fedseg.errors import PlanError
from fedseg.evaluation.private import noised_means
from fedseg.plan import StudyPlan
from fedseg.privacy.noise import Noise
from fedseg.result import PatientScores


def plan_of(noise: float = 2.0, expected: int = 10) -> StudyPlan:
    plan = private_plan(metrics=noise, promise={"expected_validation": expected})
    task = plan.task.model_copy(update={"labels": {"ball": 1, "cube": 2}})
    evaluation = plan.evaluation.model_copy(update={"metrics": ("dice", "nsd")})
    return plan.model_copy(update={"task": task, "evaluation": evaluation})


def patient(number: int, ball: float | None, cube: float | None = 0.5) -> PatientScores:
    scores = {"ball": ball, "cube": cube}
    return PatientScores(site="A", patient=f"p{number}", cases=1, dice=scores, nsd=scores)


def test_a_release_is_the_noisy_sum_over_the_declared_number() -> None:
    plan = plan_of(expected=10)
    found = noised_means([patient(0, 0.8), patient(1, None)], plan, Noise.seeded(1, "m"))
    noise = Noise.seeded(1, "m").gaussian((2, 2), 2.0 * sqrt(4))
    expected = np.clip((np.array([[0.8, 1.0], [0.8, 1.0]]) + noise) / 10, 0, 1)
    assert list(found) == ["dice", "nsd"]
    assert np.allclose([[found[m][x] for x in ("ball", "cube")] for m in found], expected)


def test_values_stay_in_range_and_everything_is_there() -> None:
    for seed in range(20):
        found = noised_means([], plan_of(expected=1), Noise.seeded(seed, "m"))
        values = [value for scores in found.values() for value in scores.values()]
        assert len(values) == 4 and all(v is not None and 0 <= v <= 1 for v in values)


def test_a_label_that_the_site_does_not_annotate_is_none_and_moves_no_other_number() -> None:
    plan, patients = plan_of(), [patient(0, 0.8), patient(1, 0.4)]
    whole = noised_means(patients, plan, Noise.seeded(1, "m"))
    part = noised_means(patients, plan, Noise.seeded(1, "m"), ("ball",))
    assert part == {metric: {"ball": whole[metric]["ball"], "cube": None} for metric in whole}


@pytest.mark.parametrize("value", [7.0, -3.0, float("nan"), float("inf"), None])
def test_no_patient_moves_the_sum_by_more_than_the_bound(value: float | None) -> None:
    plan = plan_of(noise=0.05, expected=100)
    base = [patient(i, 0.5) for i in range(50)]

    def released(more: list[PatientScores]) -> np.ndarray:
        found = noised_means([*base, *more], plan, Noise.seeded(3, "m"))
        return 100 * np.array([list(scores.values()) for scores in found.values()], dtype=float)

    odd = PatientScores.model_construct(
        site="A", patient="odd", cases=1, hd95_mm={}, dice={"ball": value, "cube": value},
        nsd={"ball": value},
    )  # fmt: skip
    assert np.linalg.norm(released([odd]) - released([])) <= sqrt(4) + 1e-9


def test_a_plan_that_releases_none_has_none() -> None:
    with pytest.raises(PlanError, match="noised"):
        noised_means([], private_plan(), Noise.seeded(1, "m"))
