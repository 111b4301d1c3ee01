"""The page of an inspection: findings, the cohort's table and a picture of every case.

One HTML file without any outside resource. It shows patients: it stays in the hospital.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from fedseg.imaging.cases import Case, Manifest
from fedseg.imaging.overlays import colour_of, overlay_png
from fedseg.imaging.quality import CaseSummary, Inspection
from fedseg.imaging.readers import read_case
from fedseg.imaging.volumes import Volume
from fedseg.task import Task

MAX_PICTURES = 300


@dataclass(frozen=True)
class Picture:
    """A case with its picture.

    Attributes:
        uri: a PNG as a data URI, or "" where the image cannot be read.
        alt: what the picture shows, in words.
    """

    case: str
    uri: str
    alt: str
    flagged: bool


def render_check_page(
    inspection: Inspection,
    manifest: Manifest,
    task: Task,
    *,
    made_at: datetime,
    progress: Callable[[str], None] | None = None,
) -> str:
    """The whole page as HTML.

    Cases with findings are pictured first; after the first 300 cases no more pictures are drawn,
    and the page says so.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("fedseg.imaging"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    flagged = {finding.case for finding in inspection.findings}
    cases = sorted(manifest.cases, key=lambda case: (case.name not in flagged, case.name))
    pictures = []
    for case in cases[:MAX_PICTURES]:
        pictures.append(_picture(case, manifest, task, flagged=case.name in flagged))
        if progress:
            progress(case.name)
    return environment.get_template("check.html").render(
        inspection=inspection,
        errors=[f for f in inspection.findings if f.severity == "error"],
        warnings=[f for f in inspection.findings if f.severity == "warning"],
        pictures=pictures,
        left_out=max(0, len(cases) - MAX_PICTURES),
        sites=_by_site(inspection.table),
        labels=[(name, colour_of(value)) for name, value in task.labels.items()],
        channels=[channel.name for channel in task.channels],
        planar=task.dimensions == 2,
        made_at=made_at.strftime("%Y-%m-%d %H:%M"),
    )


def _picture(case: Case, manifest: Manifest, task: Task, *, flagged: bool) -> Picture:
    """The picture of one case; of the image alone where its label is at fault."""
    volume = _volume(case, manifest, task)
    if volume is None:
        return Picture(case.name, "", "the image cannot be read", flagged)
    planes = "three slices" if task.dimensions == 2 else "axial, coronal and sagittal slice"
    shown = [
        name
        for name, value in task.labels.items()
        if volume.label is not None and (volume.label == value).any()
    ]
    what = f"with {', '.join(shown)} outlined" if shown else "without labels"
    uri = overlay_png(volume, planar=task.dimensions == 2)
    return Picture(case.name, uri, f"{case.name}: {planes} {what}", flagged)


def _volume(case: Case, manifest: Manifest, task: Task) -> Volume | None:
    """The case with its label, else without, else nothing: `inspect` has said why."""
    unlabelled = Case(case.name, case.patient, case.site, case.split, case.images, None)
    for attempt in (replace(case, annotated=None), unlabelled):
        try:
            return read_case(attempt, task, manifest.label_map)
        except Exception:
            continue
    return None


def _by_site(table: tuple[CaseSummary, ...]) -> list[tuple[str, int, int, dict[str, int]]]:
    """Site, patients, cases and patients by split."""
    rows = []
    for site in sorted({row.site for row in table}):
        own = [row for row in table if row.site == site]
        splits = {
            split: len({row.patient for row in own if row.split == split})
            for split in ("train", "val", "test")
        }
        rows.append((site or "(no site)", len({row.patient for row in own}), len(own), splits))
    return rows
