"""DICOM series as volumes.

Slices are placed by ImagePositionPatient and ImageOrientationPatient alone, never by
InstanceNumber, SliceThickness or file name. A folder holds one series; two series are never
stacked, and a gap between slices is an error, because interpolating it would invent anatomy.
DICOM's LPS coordinates become RAS here.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.imaging.findings import CaseError
from fedseg.imaging.volumes import LPS_TO_RAS, Affine, check_affine

NOT_IMAGES = frozenset({"SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC"})
STORAGE = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4"}
STEP_TOLERANCE = 0.01


@dataclass(frozen=True)
class Series:
    """One series as a volume.

    Attributes:
        array: float32, shape (columns, rows, slices), after rescale (HU for CT).
        affine_ras: float64 (4, 4), voxel index to RAS+ mm.
        modality: as the series says, for example "CT".
        frame_uid: frame of reference, or "".
        uids: SOP instance UIDs, for resolving references.
    """

    array: NDArray[np.float32]
    affine_ras: Affine
    modality: str
    frame_uid: str
    uids: frozenset[str]


def read_series(folder: Path) -> Series:
    """Read the one series of a folder; files that are no DICOM images are passed over.

    Raises:
        DataError: no image, several series, slices missing, doubled or tilted, or pixel data that
            cannot be decoded.
    """
    headers = image_headers(folder)
    check_series(headers)
    with quiet():
        try:
            volume = _volume([read_dataset(path) for path, _ in headers])
        except (CaseError, ImportError):
            raise
        except Exception as error:
            raise CaseError(
                "dicom-unreadable",
                f"the series cannot be read as a volume ({type(error).__name__}: "
                f"{first_sentence(error)})",
                "export the original series again, uncompressed if the codec is the trouble",
            ) from None
    if volume.array.ndim != 3:
        raise CaseError("voxel-type", "the series has colour pixels", "supply greyscale images")
    affine = LPS_TO_RAS @ np.asarray(volume.affine, dtype=np.float64)[:, [2, 1, 0, 3]]
    check_affine(affine, "series")
    first = headers[0][1]
    return Series(
        array=np.ascontiguousarray(volume.array.transpose(2, 1, 0), dtype=np.float32),
        affine_ras=affine,
        modality=str(first.get("Modality", "")),
        frame_uid=str(first.get("FrameOfReferenceUID", "") or ""),
        uids=frozenset(str(h.get("SOPInstanceUID", "") or "") for _, h in headers),
    )


def check_modality(series: Series, expected: str, what: str) -> None:
    """Refuse a CT series where the plan's channel is MR, and the other way round.

    Raises:
        DataError: another modality.
    """
    if series.modality != expected:
        raise CaseError(
            "modality",
            f"the {what} should be {expected}, the series says {series.modality or 'nothing'}",
            "put the right series in the manifest, or correct the channel in the plan",
        )


def image_headers(folder: Path) -> list[tuple[Path, Any]]:
    """Path and header of every DICOM image directly in a folder, by file name.

    Raises:
        DataError: no image, or a file that says it is DICOM and is not.
    """
    found = [
        (path, header)
        for path in sorted(p for p in folder.iterdir() if p.is_file())
        if (header := read_header(path)) is not None and header.get("Modality") not in NOT_IMAGES
    ]
    if not found:
        raise CaseError(
            "series-empty",
            "the folder holds no DICOM image",
            "name the folder that holds the files of one series",
        )
    return found


def read_header(path: Path) -> Any | None:
    """The header of a DICOM file; None for other files and for a DICOMDIR.

    Raises:
        DataError: a .dcm file, or one with the DICM mark, that cannot be parsed.
    """
    with path.open("rb") as file:
        marked = file.read(132)[128:] == b"DICM"
    if path.name.upper() == "DICOMDIR" or path.name.startswith("."):
        return None
    if not marked and path.suffix.lower() not in (".dcm", ".ima"):
        return None
    return read_dataset(path, pixels=False)


def read_dataset(path: Path, *, pixels: bool = True) -> Any:
    """Parse one DICOM file.

    Raises:
        DataError: it cannot be parsed.
    """
    import pydicom

    with quiet():
        try:
            return pydicom.dcmread(path, stop_before_pixels=not pixels)
        except Exception as error:
            raise CaseError(
                "dicom-unreadable",
                f"a file of the series is not readable DICOM ({type(error).__name__})",
                "export the series again",
            ) from None


def check_series(headers: Sequence[tuple[Path, Any]]) -> None:
    """See that headers belong to one series whose slices fill a volume without gaps.

    Raises:
        DataError: several series or patients, several sizes or directions, a gap, a doubled slice.
    """
    series = Counter(str(h.get("SeriesInstanceUID", "")) for _, h in headers)
    patients = {str(h.get("PatientID", "")) for _, h in headers}
    if len(series) > 1 or len(patients) > 1:
        counts = " + ".join(str(n) for n in sorted(series.values(), reverse=True))
        raise CaseError(
            "mixed-series",
            f"the folder mixes {len(series)} series of {len(patients)} patient(s), "
            f"{counts} images: they are never stacked together",
            "put each series in a folder of its own",
        )
    if len(headers) == 1:
        return
    kinds = {(h.get("Rows"), h.get("Columns"), *_rounded(h, "PixelSpacing")) for _, h in headers}
    directions = {_rounded(h, "ImageOrientationPatient") for _, h in headers}
    if len(kinds) > 1 or len(directions) > 1:
        raise CaseError(
            "mixed-slices",
            "the slices differ in size, pixel spacing or direction (a localiser among them?)",
            "keep only the slices of one volume in the folder",
        )
    _check_steps([h for _, h in headers], next(iter(directions)))


def _check_steps(headers: Sequence[Any], direction: tuple[float, ...]) -> None:
    """Positions along the normal must rise by one constant step."""
    if len(direction) != 6 or any(h.get("ImagePositionPatient") is None for h in headers):
        raise CaseError(
            "dicom-geometry",
            "slices do not say where they lie (ImagePositionPatient or orientation is missing)",
            "export the original series with its geometry",
        )
    normal = np.cross(direction[:3], direction[3:])
    depths = np.sort(
        [np.dot(np.array(h.ImagePositionPatient, dtype=float), normal) for h in headers]
    )
    steps = np.diff(depths)
    step = float(np.sort(steps)[(len(steps) - 1) // 2])
    doubled = int((steps < 1e-3).sum())
    if doubled:
        raise CaseError(
            "slices-doubled",
            f"{doubled} slice position(s) occur twice (several echoes or time points?)",
            "keep one image a position in the folder",
        )
    odd = steps[np.abs(steps - step) > STEP_TOLERANCE * step]
    if odd.size:
        gone = int(np.maximum(np.rint(odd / step) - 1, 0).sum())
        count = f": about {gone} slice(s) missing" if gone else ""
        raise CaseError(
            "slices-missing",
            f"the slice step is {step:.4g} mm, but {odd.size} gap(s) of up to {odd.max():.4g} mm "
            f"break it{count}",
            "export the complete series again",
        )


def _volume(datasets: list[Any]) -> Any:
    """A highdicom volume (slices, rows, columns) of one multi-frame or many single-frame files."""
    import highdicom
    from pydicom.uid import generate_uid

    for index, dataset in enumerate(datasets):
        if not dataset.get("SOPClassUID"):
            dataset.SOPClassUID = STORAGE.get(str(dataset.get("Modality")), STORAGE["CT"])
        for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
            if not dataset.get(name):
                own = str(index) if name == "SOPInstanceUID" else ""
                setattr(dataset, name, generate_uid(entropy_srcs=["fedseg", name, own]))
    if len(datasets) == 1 and int(datasets[0].get("NumberOfFrames", 1) or 1) > 1:
        return highdicom.Image.from_dataset(datasets[0], copy=False).get_volume(
            dtype=np.float32, apply_real_world_transform=False
        )
    return highdicom.get_volume_from_series(
        datasets, dtype=np.float32, apply_real_world_transform=False
    )


def _rounded(header: Any, name: str) -> tuple[float, ...]:
    """A multi-valued number of a header, rounded for comparison."""
    return tuple(round(float(v), 4) for v in header.get(name, None) or ())


def first_sentence(error: Exception) -> str:
    """The start of a library's message: no paths, no values of patients."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
    return text.split(". ")[0][:120] if "/" not in text else "see the log"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom's remarks about values off the screen: they may quote a header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
