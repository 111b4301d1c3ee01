"""The smallest study that still has everything: four hospitals of phantoms, three rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedseg.durable import write_atomically
from fedseg.imaging.cases import Cohort
from fedseg.imaging.manifests import read_manifest
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.simulation.federation import Federation

SITES = ("hospital_a", "hospital_b", "hospital_c", "hospital_d")
PLAN: dict[str, Any] = {
    "study": "tiny",
    "task": {
        "dimensions": 3,
        "channels": [{"name": "phantom", "modality": "MR"}],
        "labels": {"head": 1, "body": 2},
        "spacing_mm": [1.0, 1.0, 1.0],
        "patch_size": [16, 16, 16],
    },
    "model": {"options": {"channels": [8, 16], "residual_units": 0}},
    "training": {
        "optimiser": {"learning_rate": 0.02, "state": "keep"},
        "steps_per_round": 2,
        "augmentation": {"rotation_degrees": 10, "noise": 0.05, "flip_axes": [0]},
        "seed": 7,
    },
    "aggregation": {"rounds": 3, "minimum_sites": 3},
    "evaluation": {"metrics": ["dice"], "every_rounds": 2, "overlap": 0.0},
}


def tiny_plan(**sections: Mapping[str, Any]) -> StudyPlan:
    """The tiny plan with some fields of some sections changed; not built."""
    changed = {name: {**PLAN[name], **fields} for name, fields in sections.items()}
    return StudyPlan.model_validate({**PLAN, **changed})


def tiny_private_plan(**sections: Mapping[str, Any]) -> StudyPlan:
    """The tiny plan with a guarantee that four hospitals of three patients can keep; not built."""
    promise = {
        "guarantee": "local", "epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0, "rate": 0.7,
        "expected_patients": 3, "expected_validation": 1, "patches_per_patient": 2,
        "outputs": {"counts": "none", "losses": "none", "metrics": "noised"},
    }  # fmt: skip
    changes: dict[str, dict[str, Any]] = {
        "training": {"gradient_clip_norm": None},
        "aggregation": {"weighting": "uniform"},
        "privacy": promise,
    }
    for name, fields in sections.items():
        changes[name] = changes.get(name, {}) | dict(fields)
    changed = {name: {**PLAN.get(name, {}), **fields} for name, fields in changes.items()}
    return StudyPlan.model_validate({**PLAN, **changed})


def write_plan(path: Path, plan: StudyPlan) -> Path:
    """A plan file; JSON is YAML too."""
    value = plan.model_dump(mode="json", exclude={"initial"})
    if plan.private is not None:
        del value["training"]["batch_size"]  # a file that names it under a guarantee is refused
    write_atomically(path, json.dumps(value, indent=1).encode())
    return path


def cohorts_of(data: Path, plan: StudyPlan) -> tuple[Cohort, ...]:
    """Every hospital's cohort."""
    manifest = read_manifest(data, plan.task)
    return tuple(manifest.cohort(site) for site in manifest.sites)


def tiny_federation(
    plan: StudyPlan, cohorts: Iterable[Cohort], folder: Path, cache: Path
) -> Federation:
    """A federation of these cohorts, its plan built."""
    record, initial = initial_model(plan)
    built = plan.model_copy(update={"initial": record})
    return Federation(
        plan=built, initial=initial, cohorts=tuple(cohorts), folder=folder, cache=cache
    )


def lasting(folder: Path) -> dict[str, Any]:
    """A study's model and its result without the block `run`: what equal studies share."""
    result = json.loads((folder / "result.json").read_bytes())
    del result["run"]
    return {"model": (folder / "model.safetensors").read_bytes(), "result": result}


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process: one thread, no colours, no hints of a terminal."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_", "PYTEST_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200", **more}


def fedseg(*arguments: object, module: str = "fedseg") -> subprocess.CompletedProcess[str]:
    """Run one of the commands as a user does: a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", f"from {module}.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=240,
    )
