"""`fedseg evaluate` and `fedseg predict`: using a model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedseg.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from fedseg.modelfile import ModelHeader
    from fedseg.result import PatientScores

EVALUATE_EPILOG = """Examples:

fedseg evaluate OUT/model.safetensors --data DIR

fedseg evaluate OUT/model.safetensors --data DIR --split test --json
"""
PREDICT_EPILOG = """Examples:

fedseg predict OUT/model.safetensors scan.nii.gz --out masks

fedseg predict OUT/model.safetensors dicom-folder --out masks
"""
ModelPath = Annotated[Path, typer.Argument(help="A model.safetensors of fedseg.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]


def evaluate(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="A labelled cohort, as `fedseg-site check` reads it.")],
    split: Annotated[
        Literal["train", "val", "test", "all"], typer.Option(help="Which patients.")
    ] = "val",
    site: Annotated[str | None, typer.Option(help="Only this site's patients.")] = None,
    table: Annotated[str | None, typer.Option(help="Which CSV of the data folder.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep prepared cases here.")] = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model on labelled patients: per patient, with mean and 95 % interval."""
    header, network = _load(model, device)
    with tempfile.TemporaryDirectory(prefix="fedseg-cache-") as temporary:
        folder = cache or Path(temporary) / "cache"
        patients, left_out = _score(header, network, data, split, site, table, folder)
    measured = _measured(header, patients, left_out)
    if as_json:
        typer.echo(json.dumps(measured, indent=2, sort_keys=True))
        return
    _show(measured)


def predict(
    model: ModelPath,
    images: Annotated[
        list[Path], typer.Argument(help="NIfTI files or folders of a DICOM series; one an image.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for NAME_mask.nii.gz.")],
    device: Device = "cpu",
) -> None:
    """Segment images; masks are NIfTI files in each image's own geometry."""
    from fedseg.evaluation.predict import predict_images

    header, network = _load(model, device)
    channels = len(header.plan.task.channels)
    if len(images) % channels:
        raise DataError(
            f"the model needs {channels} images a case, in the order "
            f"{', '.join(c.name for c in header.plan.task.channels)}; {len(images)} came"
        )
    cases = [images[i : i + channels] for i in range(0, len(images), channels)]
    masks = predict_images(network, header.plan, cases, out)
    console = Console()
    for mask in track(masks, "segmenting", total=len(cases), console=Console(stderr=True)):
        console.print(str(mask), highlight=False, soft_wrap=True)


def _load(path: Path, device: str) -> tuple[ModelHeader, nn.Module]:
    """A model file and its network, with the weights in it."""
    from fedseg.modelfile import load_model
    from fedseg.models.zoo import build_network, load_tensors

    header, tensors = load_model(path)
    network = build_network(header.plan.model, header.plan.task)
    load_tensors(network, tensors)
    return header, network.to(device)


def _score(
    header: ModelHeader,
    network: nn.Module,
    data: Path,
    split: Literal["train", "val", "test", "all"],
    site: str | None,
    table: str | None,
    cache: Path,
) -> tuple[list[PatientScores], int]:
    """Every wanted patient's metrics, and how many cases could not be used."""
    from fedseg.evaluation.evaluate import evaluate_cohort
    from fedseg.imaging.cache import CaseCache
    from fedseg.imaging.manifests import read_manifest
    from fedseg.imaging.quality import inspect, usable

    plan = header.plan
    manifest = read_manifest(data, plan.task, table=table)
    broken = usable(inspect(manifest, plan.task))
    prepared = CaseCache(cache, plan.task)
    patients: list[PatientScores] = []
    left_out = 0
    for name in [site] if site else manifest.sites:
        whole = manifest.cohort(name)
        cohort = whole if split == "all" else whole.split(split)
        usable_cases = cohort.without(broken)
        left_out += len(cohort.cases) - len(usable_cases.cases)
        patients += evaluate_cohort(
            network, usable_cases, prepared, plan, plan.evaluation.metrics, native=True
        )
    if not patients:
        raise DataError(f"no usable labelled case in the split {split!r}: see `fedseg-site check`")
    return patients, left_out


def _measured(header: ModelHeader, patients: list[PatientScores], left_out: int) -> dict[str, Any]:
    """The JSON of `evaluate`: mean and interval of each metric over patients, then each patient."""
    from fedseg.evaluation.statistics import mean_with_interval
    from fedseg.result import mean_of

    fields = {"dice": "dice", "hd95": "hd95_mm", "nsd": "nsd"}
    means: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for metric in header.plan.evaluation.metrics:
        per_patient = (mean_of(getattr(patient, fields[metric])) for patient in patients)
        values = [value for value in per_patient if value is not None]
        mean, low, high = mean_with_interval(values) if values else (None, None, None)
        means[metric], intervals[metric] = mean, [low, high]
    return {
        "model": header.model_digest,
        "mean": means,
        "interval_95": intervals,
        "left_out": left_out,
        "patients": [patient.model_dump(mode="json") for patient in patients],
    }


def _show(measured: dict[str, Any]) -> None:
    """Tables for people."""
    from fedseg.result import mean_of

    patients = Table("site", "patient", "Dice", "HD95 mm", "NSD")
    for patient in measured["patients"]:
        values = (mean_of(patient[field]) for field in ("dice", "hd95_mm", "nsd"))
        cells = ("-" if value is None else f"{value:.3f}" for value in values)
        patients.add_row(patient["site"], patient["patient"], *cells)
    console = Console()
    console.print(patients)
    for metric, mean in measured["mean"].items():
        low, high = measured["interval_95"][metric]
        interval = "" if low is None else f"  95 % interval {low:.4f} to {high:.4f}"
        shown = "undefined" if mean is None else f"{mean:.4f}"
        console.print(f"{metric}: mean {shown}{interval}  ({len(measured['patients'])} patients)")
    if measured["left_out"]:
        console.print(f"{measured['left_out']} cases were left out: see `fedseg-site check`")
