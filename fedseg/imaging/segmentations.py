"""DICOM SEG label maps on an image's grid, and why contours (RTSTRUCT) are refused.

Every frame is placed by its own position and orientation (DICOM PS3.3 C.8.20), so frame order,
dropped empty frames and a stated slice thickness do not matter. A voxel has one label: segments
that overlap are an error, and so are segments that the study does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.imaging.dicom import first_sentence, image_headers, quiet, read_dataset
from fedseg.imaging.findings import CaseError
from fedseg.imaging.volumes import LPS_TO_RAS, Affine, Shape, place, spacing_of
from fedseg.task import Task


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
    else by their names.

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

    with quiet():
        try:
            seg = highdicom.seg.segread(path)
            values = _segment_values(seg, task, label_map)
            return _placed_frames(seg, values, task, affine_ras, shape)
        except (CaseError, ImportError):
            raise
        except Exception as error:
            raise CaseError(
                "label-unreadable",
                f"the DICOM SEG cannot be read ({type(error).__name__}: {first_sentence(error)})",
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


def _uids(folder: Path) -> set[str]:
    """SOP instance UIDs of the images in a folder."""
    return {str(h.get("SOPInstanceUID", "") or "") for _, h in image_headers(folder)}


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
