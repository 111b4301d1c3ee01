"""What is odd about a case that can be read: empty, unlike its modality, on a strange grid.

Each check looks at one thing and knows nothing of the others. Thresholds are wide: a warning that
comes with every healthy cohort is not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedseg.imaging.cases import Case
from fedseg.imaging.findings import CaseError, Finding
from fedseg.imaging.readers import open_nifti
from fedseg.imaging.volumes import Affine, Volume, check_affine, ras_spacing_of, spacing_of
from fedseg.task import Task

COARSER, FINER, APART = 2.5, 5.0, 3.0


def judge(case: Case, volume: Volume, task: Task) -> list[Finding]:
    """What is odd about a case that can be read; a check that fails is a finding itself."""
    found: list[Finding] = []
    for check in (_constant, _intensities, _label, _grid, _header):
        try:
            found += check(case, volume, task)
        except Exception as error:
            found.append(unexpected(case.name, error))
    return found


def apart_from_cohort(spacings_mm: Mapping[str, tuple[float, float, float]]) -> list[Finding]:
    """Cases, by name, whose spacing is far from the median of three or more."""
    if len(spacings_mm) < 3:
        return []
    middle = np.median(list(spacings_mm.values()), axis=0)
    return [
        Finding(
            name,
            "warning",
            "grid-apart",
            f"its voxels are {_mm(own)} mm, the cohort's median is {_mm(middle)} mm",
            "see that it is the right series",
        )
        for name, own in spacings_mm.items()
        if (np.array(own) / middle).max() > APART or (np.array(own) / middle).min() < 1 / APART
    ]


def orphan_grid(name: str, path: Path, task: Task) -> list[Finding]:
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
        return [unexpected(name, error)]
    shape = " x ".join(str(n) for n in image.shape)
    return [
        replace(f, problem=f"the label has no image and an odd grid ({shape}): {f.problem}")
        for f in found
    ]


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
        named = ", ".join(task.labels if case.annotated is None else case.annotated)
        yield Finding(
            case.name,
            "warning",
            "label-empty",
            f"the label is empty: none of {named} occurs",
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


def _whole(image: NDArray[np.float32]) -> bool:
    """All values are whole numbers, as Hounsfield units usually are."""
    sample = image.ravel()[:: max(1, image.size // 100_000)]
    return bool((sample == np.rint(sample)).all())


def unexpected(name: str, error: Exception) -> Finding:
    """Something nobody foresaw; still a finding, never a crash."""
    return Finding(
        name,
        "error",
        "unexpected",
        f"inspecting it failed ({type(error).__name__})",
        "open the files in a viewer; if they are fine, report this to fedseg's developers",
    )


def _mm(spacing: Iterable[float]) -> str:
    """Spacings as people write them."""
    return " x ".join(f"{float(n):.3g}" for n in spacing)
