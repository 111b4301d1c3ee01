"""`fedseg evaluate` and `fedseg predict`: using a model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from fedseg.errors import DataError
from fedseg.shell import progress_bar

if TYPE_CHECKING:
    from torch import nn

    from fedseg.imaging.cases import Manifest
    from fedseg.measures import Metric
    from fedseg.modelfile import ModelHeader
    from fedseg.plan import StudyPlan
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
Wanted = Literal["train", "val", "test", "all"]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]


def evaluate(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="A labelled cohort, as `fedseg-site check` reads it.")],
    split: Annotated[Wanted, typer.Option(help="Which patients.")] = "val",
    site: Annotated[str | None, typer.Option(help="Only this site's patients.")] = None,
    table: Annotated[str | None, typer.Option(help="Which CSV of the data folder.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep prepared cases here.")] = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model on labelled patients: per patient, with mean and 95 % interval."""
    header, network = _load(model, device)
    chosen, unlabelled = _chosen(header.plan, data, split, site, table)
    with tempfile.TemporaryDirectory(prefix="fedseg-cache-") as temporary:
        folder = cache or Path(temporary) / "cache"
        patients, unusable = _score(header.plan, network, chosen, folder)
    if not patients:
        raise DataError(
            f"no usable labelled case in the split {split!r} ({unlabelled} without a label, "
            f"{unusable} unusable): see `fedseg-site check`"
        )
    measured = _measured(header, patients) | {"left_out": unusable, "unlabelled": unlabelled}
    if as_json:
        typer.echo(json.dumps(measured, indent=2, sort_keys=True))
        return
    _show(patients, measured)


def predict(
    model: ModelPath,
    images: Annotated[
        list[Path], typer.Argument(help="NIfTI files or folders of a DICOM series; one an image.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for NAME_mask.nii.gz.")],
    device: Device = "cpu",
) -> None:
    """Segment images; masks are NIfTI files in each image's own geometry and name the model."""
    segment(model, images, out, device)


def segment(model: Path, images: list[Path], out: Path, device: str) -> None:
    """Write a mask of each image, and tell its path.

    Raises:
        DataError: the images do not fit the model's channels, or one cannot be read.
        TrustError: the model file cannot be trusted.
    """
    from fedseg.evaluation.predict import predict_images

    header, network = _load(model, device)
    channels = len(header.plan.task.channels)
    if len(images) % channels:
        raise DataError(
            f"the model needs {channels} images a case, in the order "
            f"{', '.join(c.name for c in header.plan.task.channels)}; {len(images)} came"
        )
    cases = [images[i : i + channels] for i in range(0, len(images), channels)]
    note = f"fedseg {header.model_digest}"
    masks = predict_images(network, header.plan, cases, out, note=note)
    console = Console()
    for mask in track(masks, "segmenting", total=len(cases), console=Console(stderr=True)):
        console.print(str(mask), highlight=False, soft_wrap=True)


def _load(path: Path, device: str) -> tuple[ModelHeader, nn.Module]:
    """A model file and its network, with the weights in it."""
    from fedseg.modelfile import FINETUNED, load_model
    from fedseg.models.devices import require_device
    from fedseg.models.zoo import build_network, load_tensors

    device = require_device(device)
    header, tensors = load_model(path)
    if header.arm != FINETUNED and header.private is False:
        text = "[bold red]NOT PRIVATE[/]: this model was trained with seeded noise, for science"
        Console(stderr=True).print(text)
    if header.stays:
        text = (
            "[bold yellow]stays here[/]: this model was made from one hospital's patients without "
            "a guarantee; neither it nor a copy leaves that hospital"
        )
        Console(stderr=True, soft_wrap=True).print(text)
    network = build_network(header.plan.model, header.plan.task)
    load_tensors(network, tensors)
    return header, network.to(device)


def _chosen(
    plan: StudyPlan, data: Path, split: Wanted, site: str | None, table: str | None
) -> tuple[Manifest, int]:
    """The labelled cases to measure, and how many others have no label.

    The seed is that of the study, so that patients whom the data give no split fall where they did
    when the model was trained.
    """
    from fedseg.imaging.cases import Manifest
    from fedseg.imaging.manifests import read_manifest

    manifest = read_manifest(data, plan.task, table=table, seed=plan.training.seed)
    if site is not None and site not in manifest.sites:
        named = ", ".join(name for name in manifest.sites if name)
        raise DataError(
            f"the data have no site {site[:80]!r}; "
            + (f"they have: {named}" if named else "they name no sites: leave out --site")
        )
    wanted = [
        case
        for case in manifest.cases
        if site in (None, case.site) and split in ("all", case.split)
    ]
    cases = tuple(case for case in wanted if case.label is not None)
    return Manifest(manifest.root, cases, manifest.label_map), len(wanted) - len(cases)


def _score(
    plan: StudyPlan, network: nn.Module, chosen: Manifest, cache: Path
) -> tuple[list[PatientScores], int]:
    """Every patient's metrics, and how many cases could not be used."""
    from fedseg.evaluation.evaluate import evaluate_cohort
    from fedseg.imaging.cache import CaseCache
    from fedseg.imaging.quality import inspect, usable

    with progress_bar("inspecting", len(chosen.cases)) as advance:
        broken = usable(inspect(chosen, plan.task, advance))
    prepared = CaseCache(cache, plan.task)
    patients: list[PatientScores] = []
    with progress_bar("measuring", len(chosen.cases) - len(broken)) as advance:
        for site in chosen.sites:
            patients += evaluate_cohort(
                network,
                chosen.cohort(site).without(broken),
                prepared,
                plan,
                plan.evaluation.metrics,
                native=True,
                progress=advance,
            )
    return patients, len(broken)


def _measured(header: ModelHeader, patients: list[PatientScores]) -> dict[str, Any]:
    """The JSON of `evaluate`: mean and interval of each metric over patients, then each patient."""
    from fedseg.evaluation.estimates import estimate
    from fedseg.result import mean_of

    means: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for metric in header.plan.evaluation.metrics:
        found = estimate(mean_of(patient.of(metric)) for patient in patients)
        means[metric], intervals[metric] = found.mean, [found.low, found.high]
    return {
        "model": header.model_digest,
        "private": header.private,
        "mean": means,
        "interval_95": intervals,
        "patients": [patient.model_dump(mode="json") for patient in patients],
    }


def _show(patients: list[PatientScores], measured: dict[str, Any]) -> None:
    """Tables for people."""
    from fedseg.result import mean_of

    metrics: tuple[Metric, ...] = ("dice", "hd95", "nsd")
    table = Table("site", "patient", "Dice", "HD95 mm", "NSD")
    for patient in patients:
        values = (mean_of(patient.of(metric)) for metric in metrics)
        cells = ("-" if value is None else f"{value:.3f}" for value in values)
        table.add_row(escape(patient.site), escape(patient.patient), *cells)
    console = Console()
    console.print(table)
    for metric, mean in measured["mean"].items():
        low, high = measured["interval_95"][metric]
        interval = "" if low is None else f"  95 % interval {low:.4f} to {high:.4f}"
        shown = "undefined" if mean is None else f"{mean:.4f}"
        console.print(f"{metric}: mean {shown}{interval}  ({len(patients)} patients)")
    if measured["unlabelled"]:
        console.print(f"{measured['unlabelled']} cases have no label and were left out")
    if measured["left_out"]:
        console.print(f"{measured['left_out']} cases were left out: see `fedseg-site check`")
