"""Look at every case of a manifest before anything is trained on it.

Each fault becomes a finding with case, problem and remedy; each readable case becomes a row of
the cohort table. Nothing here raises for one bad case: whatever goes wrong with it, the others
are still inspected (a package that is not installed is no matter of the case). An error keeps a
case out of training (`usable`), a warning asks for a look.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedseg.imaging.annotations import Declared, drawn, undeclared
from fedseg.imaging.cases import Case, Manifest
from fedseg.imaging.findings import CaseError, Finding
from fedseg.imaging.fingerprints import Fingerprints
from fedseg.imaging.manifests import ListedManifest
from fedseg.imaging.oddities import apart_from_cohort, judge, orphan_grid, unexpected
from fedseg.imaging.readers import read_case
from fedseg.imaging.volumes import Volume, ras_spacing_of
from fedseg.task import Task

logger = logging.getLogger(__name__)

FORMAT = "fedseg-check/1"
SAMPLE_VOXELS = 2_000_000
UNLABELLED = frozenset({"label-missing", "label-ambiguous", "contours-refused"})


@dataclass(frozen=True)
class CaseSummary:
    """One row of the cohort table.

    Attributes:
        shape: voxels along the axes of the file.
        spacing_mm: along x (left-right), y (back-front) and z (foot-head), rounded.
        intensity: 1st percentile, median and 99th percentile of every channel, in its units.
        label_ml: volume in millilitres by label name; None where there is no readable label.
    """

    case: str
    patient: str
    site: str
    split: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    intensity: tuple[tuple[float, float, float], ...]
    label_ml: dict[str, float] | None


@dataclass(frozen=True)
class Inspection:
    """What was found, errors first, and the table of the cases that can be read."""

    findings: tuple[Finding, ...]
    table: tuple[CaseSummary, ...]
    cases: int
    patients: int

    @property
    def ok(self) -> bool:
        """Nothing was found, and there is something to train on."""
        return not self.findings and self.cases > 0

    def to_json(self) -> str:
        """The inspection as JSON. It names patients: it stays in the hospital."""
        value = {
            "format": FORMAT,
            "ok": self.ok,
            "cases": self.cases,
            "patients": self.patients,
            "findings": [asdict(finding) for finding in self.findings],
            "table": [asdict(row) for row in self.table],
        }
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


def inspect(
    manifest: Manifest, task: Task, progress: Callable[[str], None] | None = None
) -> Inspection:
    """Read every case once and say what is wrong with it.

    Args:
        manifest: findings that a `ListedManifest` carries are part of the result.
        task: what the study expects.
        progress: called with the name of each case once it is inspected.
    """
    listed = manifest if isinstance(manifest, ListedManifest) else None
    findings = list(listed.findings) if listed else []
    summaries: list[CaseSummary] = []
    prints, declared = Fingerprints(), Declared()
    for case in manifest.cases:
        volume, found = _read(case, task, manifest.label_map)
        findings += found
        if case.label is None and case.split != "test" and not _said(findings, case.name):
            findings.append(_unlabelled(case))
        if volume is not None and volume.label is not None:
            names = drawn(volume.label, task)
            findings += undeclared(case, names)
            declared.add(case, names)
        if volume is not None:
            summaries.append(_summary(case, volume, task))
            findings += judge(case, volume, task)
            prints.add(case, volume)
        if progress:
            progress(case.name)
    findings += prints.findings()
    findings += declared.findings()
    findings += apart_from_cohort({row.case: row.spacing_mm for row in summaries})
    for name, path in listed.orphans if listed else ():
        findings += orphan_grid(name, path, task)
    return Inspection(
        findings=_sorted(findings),
        table=tuple(summaries),
        cases=len(manifest.cases),
        patients=len({case.patient for case in manifest.cases}),
    )


def usable(inspection: Inspection) -> frozenset[str]:
    """Names of the cases to leave out: `cohort.without(usable(inspection))` can be trained on.

    Only errors count; a case with warnings stays.
    """
    return frozenset(f.case for f in inspection.findings if f.severity == "error" and f.case)


def _read(
    case: Case, task: Task, label_map: Sequence[tuple[int, int]]
) -> tuple[Volume | None, list[Finding]]:
    """The case, or its image alone where the label is at fault, and what went wrong.

    All that is drawn is read, declared or not.
    """
    try:
        return read_case(replace(case, annotated=None), task, label_map), []
    except CaseError as error:
        found = [error.of(case.name)]
    except ImportError:
        raise
    except Exception as error:
        logger.debug("unexpected failure while inspecting a case", exc_info=True)
        found = [unexpected(case.name, error)]
    if case.label is None:
        return None, found
    try:
        return read_case(replace(case, label=None), task), found
    except Exception:  # the finding of the first attempt says why
        return None, found


def _summary(case: Case, volume: Volume, task: Task) -> CaseSummary:
    """The case's row of the table."""
    voxel_ml = abs(float(np.linalg.det(volume.affine_ras[:3, :3]))) / 1000
    label_ml = None
    if volume.label is not None:
        counts = np.bincount(volume.label.ravel(), minlength=256)
        label_ml = {name: round(voxel_ml * int(counts[v]), 4) for name, v in task.labels.items()}
    x, y, z = ras_spacing_of(volume.affine_ras)
    return CaseSummary(
        case=case.name,
        patient=case.patient,
        site=case.site,
        split=case.split,
        shape=volume.shape,
        spacing_mm=(round(x, 4), round(y, 4), round(z, 4)),
        intensity=tuple(_percentiles(image) for image in volume.image),
        label_ml=label_ml,
    )


def _percentiles(image: NDArray[np.float32]) -> tuple[float, float, float]:
    """1st, 50th and 99th percentile, from at most about two million voxels."""
    flat = image.ravel()[:: max(1, image.size // SAMPLE_VOXELS)]
    low, middle, high = (float(f"{v:.5g}") for v in np.percentile(flat, (1, 50, 99)))
    return low, middle, high


def _unlabelled(case: Case) -> Finding:
    """A case of a plain manifest without label."""
    return Finding(
        case.name,
        "error",
        "label-missing",
        "the image has no label",
        "supply the label, or drop the case; it is not trained on",
    )


def _said(findings: Iterable[Finding], name: str) -> bool:
    """Whether the manifest has already said why a case is unlabelled."""
    return any(f.case == name and f.code in UNLABELLED for f in findings)


def _sorted(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Each finding once; errors first, then by case."""
    return tuple(sorted(set(findings), key=lambda f: (f.severity, f.case, f.code, f.problem)))
