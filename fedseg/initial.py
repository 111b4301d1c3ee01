"""The initial model that lies beside a plan file: where it is, and whether it is the plan's.

`fedseg.planfile` makes it, which needs torch; reading it needs none, so the coordinator can.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedseg.errors import PlanError
from fedseg.modelfile import load_model
from fedseg.plan import load_plan


def initial_path(plan: Path) -> Path:
    """Where the initial model of a plan file lies: study.yaml -> study.initial.safetensors."""
    return plan.with_name(plan.stem + ".initial.safetensors")


def load_initial(path: Path) -> dict[str, NDArray[Any]] | None:
    """The initial model beside a plan file, or None where there is none.

    Raises:
        PlanError: the model there is not the one that the plan names, or is a hospital's own.
    """
    plan = load_plan(path)
    if plan.initial is None or not initial_path(path).exists():
        return None
    header, tensors = load_model(initial_path(path))
    if header.stays:
        raise PlanError(
            f"{initial_path(path).name} is one hospital's own model, made without a guarantee: it "
            "does not leave that hospital, so no study starts from it"
        )
    if header.model_digest != plan.initial.digest:
        raise PlanError(
            f"{initial_path(path).name} is not the model that the plan names: "
            "run `fedseg plan build` again, or bring the right file"
        )
    return tensors
