"""Phantoms: made-up patients of made-up hospitals, for tests and for a demo without data.

Every patient has a bent organ that thickens into a head at one end. `head` and `body` have the same
intensity: only shape says where one ends. Neighbours of the same intensity (a ball beside the head,
a tube along the body, scattered patches) are not part of it. Each hospital has its own scanner:
contrast (some scans are inverted, as T2 is to T1, more at one hospital than at another), intensity
scale, noise, bias field, sharpness, spacing and way of storing axes; its patients differ in size.
CT phantoms are in HU and differ in enhancement, dose and slice thickness.

On one machine the same arguments give the same bytes; a hospital's patients do not change when
others are added.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.imaging.anatomy import BODY, HEAD, draw_anatomy, turned, waves
from fedseg.task import Modality, Task

Floats = NDArray[np.floating[Any]]
Numbers = NDArray[np.generic]

LABELS = {"head": HEAD, "body": BODY}
MANY_OR_FEW = (1.0, 0.625, 1.25, 1.0, 0.75)


@dataclass(frozen=True)
class Scanner:
    """How one hospital's images differ from another's.

    Attributes:
        contrast: MR: exponent applied to intensities in [0, 1]. CT: enhancement of organ and
            vessels, 1 for the portal venous phase.
        inverted: MR: share of the scans whose dark and bright are exchanged.
        scale: MR: the stored value of 1, the brightest tissue. CT: 1, the file holds HU.
        dtype: as stored.
        noise: MR: Rician, as a share of the range. CT: in HU.
        bias: strength of the multiplicative field (MR only).
        blur_mm: width of the point spread.
        size: of the anatomy.
        slice_mm: spacing along the third RAS axis; the others are 1 mm.
        axes: how the file stores them.
        tilt_degrees: obliqueness of the grid.
    """

    contrast: float
    inverted: float
    scale: float
    dtype: str
    noise: float
    bias: float
    blur_mm: float
    size: float
    slice_mm: float
    axes: str
    tilt_degrees: float


MR_SCANNERS = (
    Scanner(1.0, 0.0, 255, "uint8", 0.03, 0.2, 0.5, 1.0, 1.0, "RAS", 0),
    Scanner(0.6, 0.4, 900, "int16", 0.05, 0.3, 0.7, 0.9, 1.0, "LPS", 0),
    Scanner(1.7, 0.1, 1e5, "float32", 0.04, 0.3, 0.5, 1.1, 1.0, "LAS", 8),
    Scanner(1.0, 0.8, 600, "int16", 0.04, 0.2, 0.6, 0.95, 1.0, "PSR", 0),
    Scanner(1.2, 0.3, 3000, "int16", 0.06, 0.4, 0.8, 1.05, 1.25, "RAS", 12),
)
CT_SCANNERS = (
    Scanner(1.0, 0.0, 1, "int16", 18, 0, 0.6, 1.0, 1.0, "LPS", 0),
    Scanner(0.4, 0.0, 1, "int16", 25, 0, 0.8, 0.9, 1.0, "RAS", 0),
    Scanner(1.4, 0.0, 1, "int16", 30, 0, 0.5, 1.1, 1.0, "LAS", 0),
    Scanner(0.1, 0.0, 1, "int16", 15, 0, 0.7, 0.95, 1.25, "LPS", 0),
    Scanner(0.8, 0.0, 1, "int16", 35, 0, 0.5, 1.05, 1.0, "LPI", 5),
)


def phantom_task(modality: Modality = "MR") -> Task:
    """The task that fits phantoms: two labels, 1 mm, patches of 32 voxels a side."""
    return Task.model_validate(
        {
            "dimensions": 3,
            "channels": [{"name": "phantom", "modality": modality}],
            "labels": LABELS,
            "spacing_mm": (1.0, 1.0, 1.0),
            "patch_size": (32, 32, 32),
            "normalisation": {"CT": {"window_hu": (-150.0, 250.0)}} if modality == "CT" else {},
        }
    )


def write_phantoms(
    folder: Path,
    *,
    sites: int = 5,
    patients_per_site: int | Sequence[int] = 8,
    cases_per_patient: int = 1,
    modality: Modality = "MR",
    shape: tuple[int, int, int] = (40, 48, 40),
    seed: int = 0,
) -> Path:
    """Write a federation of phantoms as NIfTI with a table, as a hospital would hand it over.

    Args:
        folder: gets images/NAME.nii.gz, labels/NAME.nii.gz and, last, sites.csv with the columns
            subject, site, split, patient. A quarter of a site's patients, at least two, are val.
        sites: 1 to 26, named hospital_a, hospital_b, ...
        patients_per_site: about how many, at least 3: hospitals have between 5/8 and 5/4 of it;
            or the number at each hospital.
        cases_per_patient: the same anatomy, scanned again in another position.
        modality: MR or CT.
        shape: field of view along R, A and S, mm; at least 16 each.
        seed: another seed, other patients.

    Returns:
        The folder.

    Raises:
        ValueError: an argument is out of its range.
    """
    counts = _patients(sites, patients_per_site)
    if min(shape) < 16 or cases_per_patient < 1 or seed < 0:
        raise ValueError("shape needs 16 mm or more, patients a case, and the seed is not negative")
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = [("subject", "site", "split", "patient")]
    for site, count in enumerate(counts):
        scanner = (MR_SCANNERS if modality == "MR" else CT_SCANNERS)[site % 5]
        letter = chr(ord("a") + site)
        for number in range(count):
            split = "val" if number >= count - max(2, round(count / 4)) else "train"
            for case in range(cases_per_patient):
                name = f"phantom_{letter}{number + 1:02d}" + (f"_{case + 1}" if case else "")
                image, label, affine = _case(scanner, modality, shape, (seed, site, number, case))
                _write(folder / "images" / f"{name}.nii.gz", image, affine)
                _write(folder / "labels" / f"{name}.nii.gz", label, affine)
                rows.append((name, f"hospital_{letter}", split, f"P{letter}{number + 1:02d}"))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    (folder / "sites.csv").write_text(text.getvalue(), encoding="utf-8")
    return folder


def _patients(sites: int, patients_per_site: int | Sequence[int]) -> list[int]:
    """How many patients each hospital has."""
    if isinstance(patients_per_site, int):
        shares = (MANY_OR_FEW[site % 5] for site in range(sites))
        counts = [max(3, round(share * patients_per_site)) for share in shares]
    else:
        counts = list(patients_per_site)
    if not 1 <= sites <= 26 or len(counts) != sites or min(counts) < 3:
        raise ValueError("sites must be 1 to 26, each with 3 patients or more")
    return counts


def _case(
    scanner: Scanner,
    modality: Modality,
    shape: tuple[int, int, int],
    key: tuple[int, int, int, int],
) -> tuple[Numbers, Numbers, Floats]:
    """One case as its hospital stores it: image, label, affine."""
    scan = np.random.default_rng(key)
    spacing = np.array([1.0, 1.0, scanner.slice_mm])
    points = _points(shape, spacing)
    moved = points + scan.normal(0, 0.5, 3).astype(np.float32)
    placed = turned(moved, scan.normal(0, 0.05, 3))
    size = scanner.size * min(shape) / 40
    tissue, label = draw_anatomy(placed, np.random.default_rng(key[:3]), size)
    make = _mr_image if modality == "MR" else _ct_image
    image = make(tissue, points, scanner, scan)
    affine = np.eye(4)
    affine[:3, :3] = turned(np.eye(3), np.radians([scanner.tilt_degrees, 0, scanner.tilt_degrees]))
    affine[:3, :3] *= spacing
    affine[:3, 3] = scan.uniform(-60, 60, 3)
    return _as_file(_stored(image, scanner), label, affine, scanner.axes)


def _as_file(
    image: Numbers, label: Numbers, affine: Floats, axes: str
) -> tuple[Numbers, Numbers, Floats]:
    """RAS arrays as a file with these axes holds them."""
    known: Any = orientations  # nibabel's are untyped
    turn = known.ornt_transform(known.axcodes2ornt("RAS"), known.axcodes2ornt(axes))
    affine = affine @ known.inv_ornt_aff(turn, label.shape)
    return known.apply_orientation(image, turn), known.apply_orientation(label, turn), affine


def _points(shape: tuple[int, int, int], spacing: Floats) -> Floats:
    """The voxel centres of a RAS grid about the origin, (X, Y, Z, 3), mm."""
    size = [max(1, round(n / s)) for n, s in zip(shape, spacing, strict=True)]
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, spacing, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)


def _mr_image(
    tissue: NDArray[np.uint8], points: Floats, scanner: Scanner, rng: np.random.Generator
) -> Floats:
    """Contrast, texture, point spread, bias field, then Rician noise; brightest about 1."""
    signal: Floats = np.array([0.75, 0.45, 0.12], dtype=np.float32)[tissue]
    signal += 0.03 * waves(points, rng, 7)
    signal = np.clip(1 - signal if rng.random() < scanner.inverted else signal, 0.02, 1)
    signal = signal ** (scanner.contrast * rng.uniform(0.7, 1.4))
    signal = _blurred(signal, scanner) * np.exp(scanner.bias * waves(points, rng, 90, count=4) / 2)
    real, imaginary = scanner.noise * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    magnitude: Floats = np.hypot(signal + real, imaginary)
    return magnitude * rng.uniform(0.8, 1.0)


def _ct_image(
    tissue: NDArray[np.uint8], points: Floats, scanner: Scanner, rng: np.random.Generator
) -> Floats:
    """Fat, organ and vessels in HU, with noise as sharp as the reconstruction."""
    phase = scanner.contrast * rng.uniform(0.8, 1.2)
    signal: Floats = np.array([-60, 40 + 60 * phase, 40 + 150 * phase], np.float32)[tissue]
    signal += 12 * waves(points, rng, 7)
    noise = _blurred(rng.standard_normal(signal.shape, dtype=np.float32), scanner)
    noise *= scanner.noise / noise.std()
    return _blurred(signal, scanner) + noise


def _blurred(image: Floats, scanner: Scanner) -> Floats:
    """The image through the scanner's point spread."""
    width = [scanner.blur_mm, scanner.blur_mm, scanner.blur_mm / scanner.slice_mm]
    blurred: Floats = ndimage.gaussian_filter(image, width, mode="nearest")
    return blurred


def _stored(image: Floats, scanner: Scanner) -> Numbers:
    """The numbers that the scanner writes: its own scale for MR, HU for CT."""
    image = image * scanner.scale
    if scanner.dtype == "float32":
        return image.astype(np.float32)
    limits = np.iinfo(scanner.dtype)
    return np.clip(np.rint(image), limits.min, limits.max).astype(scanner.dtype)


def _write(path: Path, data: Numbers, affine: Floats) -> None:
    """NIfTI in gzip without name or time, so that equal data are equal bytes."""
    image: Any = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    with path.open("wb") as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as stream:
        stream.write(image.to_bytes())
