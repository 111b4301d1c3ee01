"""Plan files on disk: a commented example, and how a plan is built."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import TypeAdapter

from fedseg.arrays import Arrays, digest_of, schema_of
from fedseg.durable import write_atomically
from fedseg.errors import DataError, PlanError
from fedseg.initial import initial_path, load_initial
from fedseg.modelfile import load_model, save_model
from fedseg.plan import StudyPlan, load_plan, parse_plan
from fedseg.promise import Calibration
from fedseg.schema import InitialModel

__all__ = [
    "EXAMPLES",
    "build",
    "example",
    "initial_path",
    "load_initial",
    "load_written",
    "write_example",
]

_BLOCK = re.compile(
    r"^(# Written by `fedseg plan build`.*\n)?(initial|calibrated):.*(\n[ \t].*|\n)*", re.M
)
_NOTE = "# Written by `fedseg plan build`: the model that the study starts from. Do not edit.\n"

EXAMPLES = ("mr-3d", "mr-3d-private", "ct-2d")


def example(name: str = "mr-3d") -> str:
    """The text of a commented example plan, one of `EXAMPLES`."""
    return (files("fedseg") / "plans" / f"{name}.yaml").read_text(encoding="utf-8")


def build(path: Path, start: Path | None = None) -> StudyPlan:
    """Make the initial model of a plan and calibrate its noise; record both in the plan file.

    The file keeps its comments; only its blocks `initial` and `calibrated` are replaced.

    Args:
        path: of the plan.
        start: a model file to start from, of the same network and task; without it the weights
            come from the plan's seed. The guarantee does not cover who it was trained on. Adapters
            that it has and the plan has not are folded into its weights; those that the plan has
            and it has not begin fresh.

    Raises:
        PlanError: the plan does not hold, its network cannot be built, the model to start from is
            of another network or task, or not finite, or there is none for adapters to adapt.
        DataError, TrustError: the model file cannot be read or trusted.
    """
    from fedseg.models.zoo import initial_model, require_start
    from fedseg.privacy.schedule import calibrated

    plan = load_written(path)
    if start is None:
        require_start(plan)
    record, tensors = initial_model(plan)
    if start is not None:
        record, tensors = started_from(start, plan, record, tensors)
    text = _with_built(path.read_text(encoding="utf-8"), record, calibrated(plan))
    plan = parse_plan(text.encode(), source=path.name)
    save_model(initial_path(path), plan, tensors, arm="initial", rounds=0)
    write_atomically(path, text.encode())
    return plan


def load_written(path: Path) -> StudyPlan:
    """Read and check a plan as people write it: what nothing would read is refused as well.

    A study's own plan, which a program wrote, names every field, and is taken as it is.

    Raises:
        PlanError: the plan does not hold, or names a setting that has no meaning under its
            guarantee.
    """
    plan = load_plan(path)
    named = "batch_size" in plan.training.model_fields_set
    if plan.private is not None and named and not _written_by_program(path, plan):
        raise PlanError(
            f"{path.name}: training.batch_size has no meaning under a guarantee: privacy.rate says "
            "with which probability each patient is in a step, and privacy.patches_per_patient how "
            "much each brings; remove the line"
        )
    return plan


def _written_by_program(path: Path, plan: StudyPlan) -> bool:
    """True for JSON that holds what the plan's canonical bytes hold, however it is laid out."""
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(plan.canonical_bytes))
    except ValueError:
        return False


def started_from(
    start: Path, plan: StudyPlan, schema: InitialModel, drawn: Arrays
) -> tuple[InitialModel, dict[str, NDArray[Any]]]:
    """A model file as the initial model of a plan.

    The patch size may differ; the guarantee and the training may, too.

    Args:
        schema: the record of any model of the plan's network, for its tensors.
        drawn: tensors of such a model, for fresh adapters.

    Raises:
        PlanError: the model is of another network or task, or not finite, or does not leave the
            hospital that made it.
        DataError, TrustError: the file cannot be read or trusted.
    """
    header, tensors = load_model(start)
    if header.stays:
        raise PlanError(
            f"{start.name} cannot be the initial model: one hospital trained it on its own "
            "patients without a guarantee, so it does not leave that hospital; start from the "
            "shared model, or from one that was pre-trained on public data"
        )
    for field, own, other in _parts(plan, header.plan):
        if own != other:
            raise PlanError(
                f"{start.name} cannot be the initial model: its {field} is {_short(other)}, the "
                f"plan's is {_short(own)}; pre-train with this plan, or change the plan"
            )
    if header.plan.model != plan.model:
        from fedseg.models.zoo import readapted

        tensors = readapted(tensors, header.plan.model, plan.model, plan.task, drawn)
    if schema_of(tensors) != schema.tensors:
        raise PlanError(
            f"{start.name} cannot be the initial model: its tensors are not those that the plan's "
            "network has here; the network's code may have another version: pre-train anew"
        )
    if not all(np.isfinite(array).all() for array in tensors.values()):
        raise PlanError(f"{start.name} cannot be the initial model: it holds NaN or infinity")
    return schema.model_copy(update={"digest": digest_of(tensors)}), tensors


def _parts(plan: StudyPlan, other: StudyPlan) -> Iterator[tuple[str, object, object]]:
    """Field by field, what a model belongs to."""
    own, others = (each.model.model_copy(update={"adapters": None}) for each in (plan, other))
    yield "model", own, others
    for field in ("dimensions", "channels", "labels", "spacing_mm", "normalisation"):
        yield f"task.{field}", getattr(plan.task, field), getattr(other.task, field)


def _short(value: object) -> str:
    """A plan's value in one line."""
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    return json.dumps(plain)[:200]


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
    for field in ("personal", "frozen"):
        names = getattr(record, field)
        lines += [f"  {field}: {json.dumps(list(names))}"] if names else []
    if noise is not None:
        lines += ["calibrated:", f"  training: {noise.training!r}"]
        lines += [f"  metrics: {noise.metrics!r}"] if noise.metrics else []
    return _BLOCK.sub("", text).rstrip("\n") + "\n\n" + "\n".join(lines) + "\n"
