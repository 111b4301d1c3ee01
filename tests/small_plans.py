"""The smallest plans, models and messages, for the tests of everything that needs no torch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.arrays import Arrays, digest_of, schema_of
from fedseg.plan import StudyPlan
from fedseg.schema import InitialModel
from fedseg.updates import (
    AnswerHeader,
    Body,
    Enlisted,
    Evaluated,
    Received,
    Trained,
    seal_answer,
)

VALUES: dict[str, Any] = {
    "study": "tiny",
    "task": {
        "dimensions": 3,
        "channels": [{"name": "T1w", "modality": "MR"}],
        "labels": {"anterior": 1, "posterior": 2},
        "spacing_mm": [1.0, 1.0, 2.0],
        "patch_size": [8, 8, 8],
    },
    "model": {"options": {"channels": [4, 8]}},
    "aggregation": {"rounds": 3, "minimum_sites": 2, "attempts": 2, "round_timeout_s": 60.0},
    "evaluation": {"metrics": ["dice"], "every_rounds": 2},
}


def values(**changes: Any) -> dict[str, Any]:
    """The plan's values with some set or, given as None, removed; `a__b=1` sets a.b."""
    found = copy.deepcopy(VALUES)
    for key, value in changes.items():
        *sections, field = key.split("__")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[field] = value
        if value is None:
            del inner[field]
    return found


def tiny_model(seed: int = 0) -> dict[str, NDArray[Any]]:
    """Three small tensors, one of them without axes."""
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": rng.normal(size=(2, 3)).astype(np.float32),
        "conv.bias": rng.normal(size=(2,)).astype(np.float32),
        "gain": np.asarray(rng.normal(), np.float32),
    }


def built_plan(model: Arrays | None = None, **changes: Any) -> StudyPlan:
    """A plan whose initial model is `tiny_model()`, or the one that is given."""
    model = model or tiny_model()
    plan = StudyPlan.model_validate(values(**changes))
    record = InitialModel(digest=digest_of(model), tensors=schema_of(model))
    return plan.model_copy(update={"initial": record})


def body_of(stage: str, patients: int = 4, model: str | None = None) -> Body:
    """What a good site says in a stage."""
    if stage == "enlist":
        return Enlisted(patients={"train": patients}, cases={"train": patients}, left_out=0)
    if stage == "train":
        return Trained(patients=patients, steps=20, loss=0.5)
    if stage == "release":
        return Received(model=model or digest_of(tiny_model()))
    return Evaluated(patients=2, scores={"dice": {"anterior": 0.75, "posterior": 0.25}})


def answer(task: str, site: str, body: Body, delta: Arrays | None = None) -> bytes:
    """A sealed answer."""
    return seal_answer(AnswerHeader(task=task, site=site, body=body), delta)


PRIVATE: dict[str, Any] = {
    "privacy": {
        "guarantee": "local",
        "epsilon": 4.0,
        "delta": 1e-3,
        "clip_norm": 1.0,
        "expected_patients": 4,
    },
    "training": {"gradient_clip_norm": None, "steps_per_round": 20},
    "aggregation": VALUES["aggregation"] | {"weighting": "uniform"},
}


def private_values(**changes: Any) -> dict[str, Any]:
    """The values of a plan with a guarantee; changed as by `values`."""
    found = values(**copy.deepcopy(PRIVATE))
    for key, value in changes.items():
        *sections, field = key.split("__")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[field] = value
    return found


def private_plan(model: Arrays | None = None, **changes: Any) -> StudyPlan:
    """A built and calibrated plan with a guarantee (4, 0.001); no number leaves by default."""
    from fedseg.privacy.schedule import calibrated

    model = model or tiny_model()
    plan = StudyPlan.model_validate(private_values(**changes))
    record = InitialModel(digest=digest_of(model), tensors=schema_of(model))
    plan = plan.model_copy(update={"initial": record})
    return plan.model_copy(update={"calibrated": calibrated(plan)})


def withheld_body(stage: str, plan: StudyPlan, model: str | None = None) -> Body:
    """What a good site says in a stage of a plan that withholds every number."""
    if stage == "enlist":
        return Enlisted(patients={"train": None}, cases={"train": None}, left_out=None)
    if stage == "train":
        return Trained(patients=None, steps=plan.training.steps_per_round, loss=None)
    if stage == "release":
        return Received(model=model or digest_of(tiny_model()))
    nothing = dict.fromkeys(plan.task.labels)
    return Evaluated(patients=None, scores=dict.fromkeys(plan.evaluation.metrics, nothing))
