"""DICOM series as volumes, and DICOM SEG as label maps on an image's grid.

Slices are placed by ImagePositionPatient and ImageOrientationPatient alone, never by
InstanceNumber, SliceThickness or file name. A folder holds one series; two series are never
stacked, and a gap between slices is an error, because interpolating it would invent anatomy.
DICOM's LPS coordinates become RAS here. Contours (RTSTRUCT) are refused: they are no voxels.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.imaging.findings import CaseError
from fedseg.imaging.volumes import LPS_TO_RAS, Affine, Shape, check_affine, place, spacing_of
from fedseg.plan import Task

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
    with _quiet():
        try:
            volume = _volume([read_dataset(path) for path, _ in headers])
        except CaseError:
            raise
        except Exception as error:
            raise CaseError(
                "dicom-unreadable",
                f"the series cannot be read as a volume ({type(error).__name__}: "
                f"{_first_sentence(error)})",
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


def read_segmentation(
    path: Path,
    task: Task,
    label_map: Sequence[tuple[int, int]],
    affine_ras: Affine,
    shape: Shape,
    *,
    source: Path | None = None,
) -> NDArray[np.uint8]:
    """Read a DICOM SEG onto the grid of an image.

    Segments become labels by the label map (segment number to study value) where there is one,
    else by their names. Every frame is placed by its own position, so dropped empty frames and
    any frame order are fine (DICOM PS3.3 C.8.20).

    Args:
        path: the SEG file.
        task: the study's labels.
        label_map: segment number to study value; 0 leaves a segment out.
        affine_ras: of the image.
        shape: of the image, (X, Y, Z).
        source: folder of the image's series, to compare frames of reference.

    Raises:
        DataError: contours instead of a segmentation, unknown segments, overlapping labels, or a
            frame that is not on the image's grid.
    """
    header = read_dataset(path, pixels=False)
    if header.get("Modality") == "RTSTRUCT":
        raise contours_refused(header, _uids(source) if source else None)
    if header.get("Modality") != "SEG":
        raise CaseError(
            "label-kind",
            f"the label is DICOM of modality {header.get('Modality', 'unknown')}",
            "supply a DICOM SEG or a NIfTI label",
        )
    if source is not None:
        _same_frame(header, image_headers(source)[0][1])
    import highdicom

    with _quiet():
        try:
            seg = highdicom.seg.segread(path)
            values = _segment_values(seg, task, label_map)
            return _placed_frames(seg, values, task, affine_ras, shape)
        except CaseError:
            raise
        except Exception as error:
            raise CaseError(
                "label-unreadable",
                f"the DICOM SEG cannot be read ({type(error).__name__}: {_first_sentence(error)})",
                "export the segmentation again",
            ) from None


def contours_refused(header: Any, there: Iterable[str] | None) -> CaseError:
    """Why an RTSTRUCT is no label here, and whether its references resolve.

    Args:
        header: of the RTSTRUCT.
        there: SOP instance UIDs of the series beside it, or None where none is known.
    """
    wanted = set(_contour_references(header))
    lost = len(wanted - set(there)) if there is not None else 0
    missing = (
        f", and {lost} of the {len(wanted)} images they refer to are not there" if lost else ""
    )
    return CaseError(
        "contours-refused",
        f"the label is an RTSTRUCT: contours are not read{missing}",
        "convert the contours to DICOM SEG or NIfTI on this series' own grid",
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

    with _quiet():
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


def _segment_values(seg: Any, task: Task, label_map: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Study value of every segment number; 0 for those that the label map leaves out."""
    names = {int(n): str(seg.get_segment_description(n).segment_label) for n in seg.segment_numbers}
    if label_map:
        given = dict(label_map)
        values = {n: given[n] for n in names if n in given}
    else:
        by_name = {name.casefold(): value for name, value in task.labels.items()}
        values = {n: by_name[s.casefold()] for n, s in names.items() if s.casefold() in by_name}
    unknown = [f"{n} ({s})" for n, s in names.items() if n not in values]
    if unknown:
        raise CaseError(
            "label-unknown",
            f"segment(s) {', '.join(unknown[:12])} are no labels of the study "
            f"({', '.join(task.labels)})",
            "say in labels.yaml what each segment number means, or background",
        )
    return values


def _placed_frames(
    seg: Any, values: dict[int, int], task: Task, affine_ras: Affine, shape: Shape
) -> NDArray[np.uint8]:
    """Every frame of a SEG at its own position; labels must not overlap."""
    result = np.zeros(shape, dtype=np.uint8)
    names = {value: name for name, value in task.labels.items()}
    for segment, pixels, frame_affine in _frames(seg, affine_ras):
        numbers = [int(n) for n in np.unique(pixels) if n] if segment is None else [segment]
        for number in numbers:
            value = values.get(number, 0)
            if not value:
                continue
            mask = (pixels == number) if segment is None else (pixels > 0)
            part = np.where(mask.T[..., np.newaxis], value, 0).astype(np.uint8)
            placed = place(part, frame_affine, affine_ras, shape, inside=True)
            clash = (placed > 0) & (result > 0) & (result != placed)
            if clash.any():
                raise CaseError(
                    "label-overlap",
                    f"segments overlap: {names[int(result[clash][0])]} and {names[value]} share "
                    "voxels",
                    "a voxel has one label: separate them, or map one to background in labels.yaml",
                )
            result = np.maximum(result, placed)
    return result


def _frames(seg: Any, affine_ras: Affine) -> Iterator[tuple[int | None, NDArray[Any], Affine]]:
    """Segment number (None in a label map), pixels (rows, columns) and affine of every frame."""
    array = seg.pixel_array
    array = array[np.newaxis] if array.ndim == 2 else array
    kind = str(seg.SegmentationType)
    if kind == "FRACTIONAL":
        array = array > 0.5 * float(seg.MaximumFractionalValue)
    shared = seg.SharedFunctionalGroupsSequence[0]
    for pixels, own in zip(array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        segment = None
        if kind != "LABELMAP":
            item = _group(own, shared, "SegmentIdentificationSequence")
            segment = int(item.ReferencedSegmentNumber)
        yield segment, pixels, _frame_affine(own, shared, affine_ras)


def _frame_affine(own: Any, shared: Any, affine_ras: Affine) -> Affine:
    """RAS affine of one frame; its third step is the image's own along the normal."""
    position = _group(own, shared, "PlanePositionSequence").ImagePositionPatient
    direction = np.array(_group(own, shared, "PlaneOrientationSequence").ImageOrientationPatient)
    row_mm, column_mm = _group(own, shared, "PixelMeasuresSequence").PixelSpacing
    normal = np.cross(direction[:3].astype(float), direction[3:].astype(float))
    normal_ras = LPS_TO_RAS[:3, :3] @ normal
    along = np.abs(normal_ras @ affine_ras[:3, :3]) / np.array(spacing_of(affine_ras))
    affine = np.eye(4)
    affine[:3, 0] = direction[:3].astype(float) * float(column_mm)
    affine[:3, 1] = direction[3:].astype(float) * float(row_mm)
    affine[:3, 2] = normal * spacing_of(affine_ras)[int(np.argmax(along))]
    affine[:3, 3] = np.array(position, dtype=float)
    return LPS_TO_RAS @ affine


def _uids(folder: Path) -> set[str]:
    """SOP instance UIDs of the images in a folder."""
    return {str(h.get("SOPInstanceUID", "") or "") for _, h in image_headers(folder)}


def _group(own: Any, shared: Any, name: str) -> Any:
    """A functional group of a frame, its own or the shared one."""
    return own[name].value[0] if name in own else shared[name].value[0]


def _same_frame(seg: Any, image: Any) -> None:
    """Refuse a segmentation in another frame of reference than the image."""
    a, b = (str(d.get("FrameOfReferenceUID", "") or "") for d in (seg, image))
    if a and b and a != b:
        raise CaseError(
            "frame-of-reference",
            "the segmentation was made in another frame of reference than the image",
            "is it the label of another examination? supply the one of this series",
        )


def _contour_references(header: Any) -> Iterable[str]:
    """SOP instance UIDs that the contours and the structure set of an RTSTRUCT refer to."""
    for frame in header.get("ReferencedFrameOfReferenceSequence", None) or ():
        for study in frame.get("RTReferencedStudySequence", None) or ():
            for series in study.get("RTReferencedSeriesSequence", None) or ():
                for image in series.get("ContourImageSequence", None) or ():
                    yield str(image.ReferencedSOPInstanceUID)
    for roi in header.get("ROIContourSequence", None) or ():
        for contour in roi.get("ContourSequence", None) or ():
            for image in contour.get("ContourImageSequence", None) or ():
                yield str(image.ReferencedSOPInstanceUID)


def _rounded(header: Any, name: str) -> tuple[float, ...]:
    """A multi-valued number of a header, rounded for comparison."""
    return tuple(round(float(v), 4) for v in header.get(name, None) or ())


def _first_sentence(error: Exception) -> str:
    """The start of a library's message: no paths, no values of patients."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
    return text.split(". ")[0][:120] if "/" not in text else "see the log"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom's remarks about values off the screen: they may quote a header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
