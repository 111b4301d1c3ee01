"""Membership inference finds members where there is something to find, and knows chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from private_plans import private_plan

from fedseg.errors import DataError
from fedseg.imaging.transforms import PreparedCase
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.privacy.audit.membership import attacked, membership


def case_of(seed: int) -> PreparedCase:
    """A ball in noise whose label is moved by chance: something to remember."""
    rng = np.random.default_rng(seed)
    label = np.zeros((8, 8, 2), np.uint8)
    x, y = rng.integers(0, 5, 2)
    label[x : x + 3, y : y + 3] = 1
    image = rng.standard_normal((1, *label.shape))
    return PreparedCase(image.astype(np.float32), label, np.eye(4), (1.0, 1.0, 1.0))


PATIENTS = {f"p{i}": [case_of(i)] for i in range(6)}


def drawn(models: int, patients: int, leak: float, seed: int) -> tuple[Any, Any]:
    """Confidences that are higher by `leak` standard deviations where a patient took part."""
    rng = np.random.default_rng(seed)
    half = np.arange(models) < models // 2
    members = np.stack([rng.permutation(half) for _ in range(patients)], 1)
    own = rng.normal(size=patients)  # some patients are harder than others
    return own + rng.normal(size=members.shape) + leak * members, members


def test_the_attack_finds_members_and_the_control_does_not() -> None:
    found = attacked(*drawn(32, 40, 2.0, 1), seed=1)
    assert found.leaks
    assert found.attack[0] > 0.8
    assert abs(found.control[0] - 0.5) < 0.1
    assert found.hit_rate > 0.5
    assert "can be told apart" in found.text


def test_where_nothing_leaks_the_attack_is_no_better_than_its_control() -> None:
    found = [attacked(*drawn(8, 20, 0.0, seed), seed=seed) for seed in range(60)]
    assert abs(np.mean([each.attack[0] for each in found]) - 0.5) < 0.03
    assert abs(np.mean([each.control[0] for each in found]) - 0.5) < 0.03
    assert sum(each.leaks for each in found) <= 6


def test_a_network_that_overfits_gives_its_patients_away() -> None:
    found = _of(_overfitting({"guarantee": "none"}))
    assert found.attack[0] > 0.75
    assert found.leaks
    assert (found.patients, found.models) == (6, 8)


def test_private_training_of_the_same_network_does_not() -> None:
    promise = {
        "guarantee": "local", "epsilon": 1.0, "delta": 1e-3, "clip_norm": 0.1,
        "expected_patients": 3, "patches_per_patient": 1,
    }  # fmt: skip
    found = _of(_overfitting(promise))
    assert not found.leaks


def test_too_few_patients_or_models_are_refused() -> None:
    plan = _overfitting({"guarantee": "none"})
    initial = initial_model(plan)[1]
    with pytest.raises(ValueError, match="multiple of 4"):
        membership(plan, initial, PATIENTS, models=6, seed=1)
    with pytest.raises(DataError, match="at least 4 patients"):
        membership(plan, initial, {"p0": PATIENTS["p0"]}, models=8, seed=1)


def _overfitting(privacy: dict[str, Any]) -> StudyPlan:
    """Many steps on few patients, with nothing to augment."""
    plan = private_plan(
        noise=20.0,
        training={
            "steps_per_round": 40, "augmentation": {}, "batch_size": 3,
            "optimiser": {"name": "adamw", "learning_rate": 0.02},
            "schedule": {"name": "constant", "warmup_rounds": 0},
        },
        aggregation={"rounds": 2},
    )  # fmt: skip
    values = plan.model_dump(exclude={"initial"}) | {"privacy": privacy}
    if privacy["guarantee"] == "none":
        values["calibrated"] = None
    return StudyPlan.model_validate(values)


def _of(plan: StudyPlan) -> Any:
    return membership(plan, initial_model(plan)[1], PATIENTS, models=8, seed=1)
