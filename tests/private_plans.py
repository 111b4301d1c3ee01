"""Small private plans, built without a search for their noise."""

from __future__ import annotations

from typing import Any

from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.promise import Calibration


def private_plan(
    dimensions: int = 2,
    *,
    noise: float = 1.0,
    metrics: float | None = None,
    promise: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    aggregation: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> StudyPlan:
    """A plan with `guarantee: local`, its initial model and this noise."""
    outputs = {"counts": "none", "losses": "none", "metrics": "noised" if metrics else "none"}
    plan = StudyPlan.model_validate(
        {
            "study": "tiny-private",
            "task": {
                "dimensions": dimensions,
                "channels": [{"name": "T1", "modality": "MR"}],
                "labels": {"ball": 1},
                "spacing_mm": [1.0] * dimensions,
                "patch_size": [8] * dimensions,
            },
            "model": {"options": {"channels": [4, 8], "residual_units": 1} | (model or {})},
            "training": {
                "steps_per_round": 2, "gradient_clip_norm": None, "mixed_precision": False,
                "augmentation": {"flip_axes": [0], "noise": 0.05, "rotation_degrees": 10},
            } | (training or {}),
            "aggregation": {"rounds": 3, "weighting": "uniform", "minimum_sites": 2}
            | (aggregation or {}),
            "evaluation": {"metrics": ["dice"], "every_rounds": 1},
            "privacy": {
                "guarantee": "local", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.5,
                "expected_patients": 4, "expected_validation": 2, "patches_per_patient": 3,
                "outputs": outputs,
            } | (promise or {}),
            "calibrated": Calibration(training=noise, metrics=metrics).model_dump(),
        }
    )  # fmt: skip
    return plan.model_copy(update={"initial": initial_model(plan)[0]})
