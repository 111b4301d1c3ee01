"""Look at every case of a manifest before anything is trained on it.

Each fault becomes a finding with case, problem and remedy; each readable case becomes a row of
the cohort table. Nothing here raises for one bad case: whatever goes wrong with it, the others
are still inspected (a package that is not installed is no matter of the case). An error keeps a
case out of training (`usable`), a warning asks for a look.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.imaging.cases import Case, Manifest
from fedseg.imaging.findings import CaseError, Finding
from fedseg.imaging.manifests import ListedManifest
from fedseg.imaging.readers import open_nifti, read_case
from fedseg.imaging.volumes import Affine, Volume, check_affine, ras_spacing_of, spacing_of
from fedseg.plan import Task

logger = logging.getLogger(__name__)

FORMAT = "fedseg-check/1"
COARSER, FINER, APART = 2.5, 5.0, 3.0
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
    prints = _Fingerprints()
    for case in manifest.cases:
        volume, found = _read(case, task, manifest.label_map)
        findings += found
        if case.label is None and case.split != "test" and not _said(findings, case.name):
            findings.append(_unlabelled(case))
        if volume is not None:
            summaries.append(_summary(case, volume, task))
            findings += _judge(case, volume, task)
            prints.add(case, volume)
        if progress:
            progress(case.name)
    findings += prints.findings()
    findings += _apart_from_cohort(summaries)
    for name, path in listed.orphans if listed else ():
        findings += _orphan_grid(name, path, task)
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


class _Fingerprints:
    """Digests of images and labels, to find the same content under two patients."""

    def __init__(self) -> None:
        self._images: dict[str, list[Case]] = defaultdict(list)
        self._labels: dict[str, list[Case]] = defaultdict(list)

    def add(self, case: Case, volume: Volume) -> None:
        """Remember a case's content."""
        if np.ptp(volume.image) > 0:
            self._images[_digest(volume.image)].append(case)
        if volume.label is not None and volume.label.any():
            self._labels[_digest(volume.label)].append(case)

    def findings(self) -> list[Finding]:
        """A finding for every case that shares its content with another one."""
        found, images = [], [g for g in self._images.values() if len(g) > 1]
        for group in images:
            two = len({case.patient for case in group}) > 1
            for case in group:
                found.append(_same_image(case, [c.name for c in group if c is not case], two=two))
        known = {case.name for group in images for case in group}
        for group in self._labels.values():
            fresh = [case for case in group if case.name not in known]
            if len({case.patient for case in fresh}) > 1:
                found += [_same_label(c, [o.name for o in fresh if o is not c]) for c in fresh]
        return found


def _read(
    case: Case, task: Task, label_map: Sequence[tuple[int, int]]
) -> tuple[Volume | None, list[Finding]]:
    """The case, or its image alone where the label is at fault, and what went wrong."""
    try:
        return read_case(case, task, label_map), []
    except CaseError as error:
        found = [error.of(case.name)]
    except ImportError:
        raise
    except Exception as error:
        logger.debug("unexpected failure while inspecting a case", exc_info=True)
        found = [_unexpected(case.name, error)]
    if case.label is None:
        return None, found
    try:
        return read_case(replace(case, label=None), task), found
    except Exception:  # the finding of the first attempt says why
        return None, found


def _judge(case: Case, volume: Volume, task: Task) -> list[Finding]:
    """What is odd about a case that can be read; a check that fails is a finding itself."""
    found: list[Finding] = []
    for check in (_constant, _intensities, _label, _grid, _header):
        try:
            found += check(case, volume, task)
        except Exception as error:
            found.append(_unexpected(case.name, error))
    return found


def _constant(case: Case, volume: Volume, task: Task) -> Iterable[Finding]:
    """A channel without any contrast."""
    for channel, image in zip(task.channels, volume.image, strict=True):
        if image.min() == image.max():
            yield Finding(
                case.name,
                "error",
                "image-constant",
                f"every voxel of channel {channel.name} is {float(image.flat[0]):g}: the image is "
                "empty",
                "export the image again",
            )


def _intensities(case: Case, volume: Volume, task: Task) -> Iterable[Finding]:
    """Values that do not look like the channel's modality."""
    for channel, image in zip(task.channels, volume.image, strict=True):
        low, high = float(image.min()), float(image.max())
        if low == high:
            continue
        span = f"its values run from {low:.4g} to {high:.4g}"
        if channel.modality == "CT" and not (-5000 <= low < -50 and 50 < high <= 40000):
            yield Finding(
                case.name,
                "warning",
                "not-hu",
                f"channel {channel.name} is CT, but {span}: these are hardly Hounsfield units",
                "export without windowing and with rescale slope and intercept applied",
            )
        if channel.modality == "MR" and -1100 < low < -900 and high > 500 and _whole(image):
            yield Finding(
                case.name,
                "warning",
                "looks-like-ct",
                f"channel {channel.name} is MR, but {span}, as Hounsfield units do",
                "see that the image is MR, or correct the channel in the plan",
            )


def _label(case: Case, volume: Volume, task: Task) -> Iterable[Finding]:
    """A label without foreground."""
    if volume.label is not None and not volume.label.any():
        yield Finding(
            case.name,
            "warning",
            "label-empty",
            f"the label is empty: none of {', '.join(task.labels)} occurs",
            "see that the structure is really absent; if it was not drawn, drop the case",
        )


def _grid(case: Case, volume: Volume, task: Task) -> Iterable[Finding]:
    """Voxels much coarser or finer than the plan's."""
    yield from _against_plan(case.name, "image", volume.affine_ras, task)


def _header(case: Case, volume: Volume, task: Task) -> Iterable[Finding]:
    """NIfTI headers that do not say where left and right are."""
    del volume, task
    for path in case.images:
        if path.is_dir():
            continue
        header = open_nifti(path, "image").header
        if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
            yield Finding(
                case.name,
                "warning",
                "orientation-unknown",
                "the header does not say how the image lies in the patient (sform and qform are "
                "unset): left and right are a guess",
                "convert it again from DICOM with a tool that writes the orientation",
            )


def _against_plan(name: str, what: str, affine: Affine, task: Task) -> Iterable[Finding]:
    """Compare spacings with the plan's, axis by axis."""
    spacing = spacing_of(affine)[:2] if task.dimensions == 2 else ras_spacing_of(affine)
    ratios = [own / plan for own, plan in zip(spacing, task.spacing_mm, strict=True)]
    if max(ratios) > COARSER or min(ratios) < 1 / FINER:
        yield Finding(
            name,
            "warning",
            "grid-odd",
            f"the {what}'s voxels are {_mm(spacing)} mm, the plan works at {_mm(task.spacing_mm)}",
            "see that it is the right series; a far coarser image holds too little detail",
        )


def _orphan_grid(name: str, path: Path, task: Task) -> list[Finding]:
    """The grid of a label that has no image: is it of this study at all?"""
    if path.is_dir() or path.suffix == ".dcm":
        return []
    try:
        image = open_nifti(path, "label")
        affine = np.asarray(image.affine, dtype=np.float64)
        check_affine(affine, "label")
        found = list(_against_plan(name, "label", affine, task))
    except CaseError as error:
        return [error.of(name)]
    except Exception as error:
        return [_unexpected(name, error)]
    shape = " x ".join(str(n) for n in image.shape)
    return [
        replace(f, problem=f"the label has no image and an odd grid ({shape}): {f.problem}")
        for f in found
    ]


def _apart_from_cohort(table: Sequence[CaseSummary]) -> list[Finding]:
    """Cases whose spacing is far from the median of the others."""
    if len(table) < 3:
        return []
    middle = np.median([row.spacing_mm for row in table], axis=0)
    found = []
    for row in table:
        ratios = np.array(row.spacing_mm) / middle
        if ratios.max() > APART or ratios.min() < 1 / APART:
            found.append(
                Finding(
                    row.case,
                    "warning",
                    "grid-apart",
                    f"its voxels are {_mm(row.spacing_mm)} mm, the cohort's median is "
                    f"{_mm(middle)} mm",
                    "see that it is the right series",
                )
            )
    return found


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


def _whole(image: NDArray[np.float32]) -> bool:
    """All values are whole numbers, as Hounsfield units usually are."""
    sample = image.ravel()[:: max(1, image.size // 100_000)]
    return bool((sample == np.rint(sample)).all())


def _digest(array: NDArray[Any]) -> str:
    """Digest of shape and content."""
    content = np.ascontiguousarray(array)
    return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()


def _same_image(case: Case, others: list[str], *, two: bool) -> Finding:
    """The same voxels under two names."""
    shown = ", ".join(others[:5])
    if two:
        return Finding(
            case.name,
            "error",
            "image-copied",
            f"the image is identical to that of {shown}, which belongs to another patient",
            "find out whose image it is and remove the other case",
        )
    return Finding(
        case.name,
        "warning",
        "image-copied",
        f"the image is identical to that of {shown} of the same patient",
        "keep one of them, or it counts twice",
    )


def _same_label(case: Case, others: list[str]) -> Finding:
    """The same label on different images of two patients."""
    return Finding(
        case.name,
        "warning",
        "label-copied",
        f"the label is identical to that of {', '.join(others[:5])}, another patient's",
        "see that the label was drawn on this image",
    )


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


def _unexpected(name: str, error: Exception) -> Finding:
    """Something nobody foresaw; still a finding, never a crash."""
    return Finding(
        name,
        "error",
        "unexpected",
        f"inspecting it failed ({type(error).__name__})",
        "open the files in a viewer; if they are fine, report this to fedseg's developers",
    )


def _sorted(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Each finding once; errors first, then by case."""
    return tuple(sorted(set(findings), key=lambda f: (f.severity, f.case, f.code, f.problem)))


def _mm(spacing: Iterable[float]) -> str:
    """Spacings as people write them."""
    return " x ".join(f"{float(n):.3g}" for n in spacing)
