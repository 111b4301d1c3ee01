"""Plan files on disk: a commented example, and how a plan is built."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import yaml

from fedseg.durable import write_atomically
from fedseg.errors import DataError
from fedseg.initial import initial_path, load_initial
from fedseg.modelfile import save_model
from fedseg.plan import InitialModel, StudyPlan, load_plan, parse_plan
from fedseg.promise import Calibration

__all__ = ["EXAMPLES", "build", "example", "initial_path", "load_initial", "write_example"]

_BLOCK = re.compile(
    r"^(# Written by `fedseg plan build`.*\n)?(initial|calibrated):.*(\n[ \t].*|\n)*", re.M
)
_NOTE = "# Written by `fedseg plan build`: the model that the study starts from. Do not edit.\n"

EXAMPLES = ("mr-3d", "ct-2d")


def example(name: str = "mr-3d") -> str:
    """The text of a commented example plan; `mr-3d` or `ct-2d`."""
    return (files("fedseg") / "plans" / f"{name}.yaml").read_text(encoding="utf-8")


def build(path: Path) -> StudyPlan:
    """Make the initial model of a plan and calibrate its noise; record both in the plan file.

    The file keeps its comments; only its blocks `initial` and `calibrated` are replaced.

    Raises:
        PlanError: the plan does not hold, or its network cannot be built.
    """
    from fedseg.models.zoo import initial_model
    from fedseg.privacy.schedule import calibrated

    plan = load_plan(path)
    record, tensors = initial_model(plan)
    text = _with_built(path.read_text(encoding="utf-8"), record, calibrated(plan))
    plan = parse_plan(text.encode(), source=path.name)
    save_model(initial_path(path), plan, tensors, arm="initial", rounds=0)
    write_atomically(path, text.encode())
    return plan


def write_example(path: Path, text: str) -> None:
    """Write a new plan file.

    Raises:
        DataError: a file is there already.
    """
    if path.exists():
        raise DataError(f"{path.name} is there already: name another file")
    write_atomically(path, text.encode())


def _with_built(text: str, record: InitialModel, noise: Calibration | None) -> str:
    """The plan's text with its built blocks replaced, or added at the end."""
    if text.lstrip().startswith("{"):  # JSON, as a study's own plan.json: it has no comments
        value = yaml.safe_load(text) | {"initial": record.model_dump(mode="json")}
        value["calibrated"] = noise.model_dump(mode="json") if noise else None
        return json.dumps(value, indent=2) + "\n"
    lines = [_NOTE + "initial:", f"  digest: {record.digest}", "  tensors:"]
    for spec in record.tensors:
        flow = {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}
        entry = yaml.safe_dump(flow, default_flow_style=True, sort_keys=False, width=10_000)
        lines.append(f"    - {entry.strip()}")
    if noise is not None:
        lines += ["calibrated:", f"  training: {noise.training!r}"]
        lines += [f"  metrics: {noise.metrics!r}"] if noise.metrics else []
    return _BLOCK.sub("", text).rstrip("\n") + "\n\n" + "\n".join(lines) + "\n"
