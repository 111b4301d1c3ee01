"""Read one case: channels and labels on one grid, in the study's label values.

Trusted: nothing. Every file may be cut short, hold text, or lie about its grid; each fault is a
`CaseError` whose text names the fault and the remedy, never the patient or the path. Images are
refused, not repaired: no NaN is imputed, no label is resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.imaging.annotations import only_annotated
from fedseg.imaging.cases import Case
from fedseg.imaging.findings import CaseError
from fedseg.imaging.volumes import (
    VOXEL_TOLERANCE,
    Affine,
    Shape,
    Volume,
    check_affine,
    grid_distance,
    place,
    spacing_of,
)
from fedseg.task import Channel, Task

LabelMap = Sequence[tuple[int, int]]


def read_case(case: Case, task: Task, label_map: LabelMap = ()) -> Volume:
    """Read a case's image and, where it has one, its label.

    Args:
        case: paths of NIfTI files or of folders that hold one DICOM series each.
        task: says how many channels there are and which labels.
        label_map: value in the file (segment number of a DICOM SEG) to the study's value.

    Returns:
        Labels that the case is not annotated with are background in it, also where they are drawn.

    Raises:
        DataError: a file is missing, broken or not of this study; the message says what to do.
    """
    image, affine = read_image(case.images, task)
    if case.label is None:
        return Volume(image, None, affine)
    label = _read_label(case, image.shape[1:], affine, task, label_map)
    return Volume(image, only_annotated(label, case, task), affine)


def read_image(paths: Sequence[Path], task: Task) -> tuple[NDArray[np.float32], Affine]:
    """Read the channels of one image.

    Args:
        paths: one path a channel in the plan's order, or one 4-D NIfTI with all channels.
        task: its channels say what is expected.

    Returns:
        The image, float32 (C, X, Y, Z), and its affine to RAS+ mm.

    Raises:
        DataError: a file is missing, broken, holds NaN, or the channels lie on different grids.
    """
    if len(paths) not in (1, len(task.channels)):
        raise CaseError(
            "channel-count",
            f"the study has {len(task.channels)} channels, the case has {len(paths)}",
            "give one file a channel, in the plan's order",
        )
    if len(paths) < len(task.channels):
        image, affine = _stacked_channels(paths[0], task)
    else:
        read = [_channel(p, c, task) for p, c in zip(paths, task.channels, strict=True)]
        affine = read[0][1]
        for (array, other), channel in zip(read, task.channels, strict=True):
            _same_grid(read[0][0].shape, affine, array.shape, other, f"channel {channel.name}")
        image = np.stack([array for array, _ in read])
    bad = int(image.size - np.isfinite(image).sum())
    if bad:
        raise CaseError(
            "image-nan",
            f"{bad} voxels of the image are NaN or infinite",
            "export the image again; fedseg does not guess what they should be",
        )
    return image, affine


def map_labels(label: NDArray[Any], task: Task, label_map: LabelMap = ()) -> NDArray[np.uint8]:
    """Turn the values of a label file into the study's.

    Raises:
        DataError: a value is not whole, or is neither mapped nor a label of the study.
    """
    values = distinct(label)
    if not np.isfinite(values).all() or (values != np.rint(values)).any():
        raise CaseError(
            "label-not-whole",
            "the label holds values that are not whole numbers (interpolated, or a probability?)",
            "export the label as whole numbers, resampled with nearest neighbour if at all",
        )
    mapping = value_mapping(task, label_map)
    unknown = [int(v) for v in values if int(v) not in mapping]
    if unknown:
        shown = ", ".join(str(v) for v in unknown[:12]) + (", ..." if len(unknown) > 12 else "")
        known = ", ".join(str(v) for v in sorted(mapping)[:20])
        raise CaseError(
            "label-unknown",
            f"unexpected label value(s) {shown}; expected {known}",
            "correct the label, or say in labels.yaml what the value means",
        )
    table = np.array([mapping[int(v)] for v in values], dtype=np.uint8)
    return table[np.searchsorted(values, label)]


def distinct(label: NDArray[Any]) -> NDArray[Any]:
    """The values of a label map, sorted; slice by slice, because sorting a large volume is slow."""
    slices = np.moveaxis(np.atleast_3d(label), 2, 0)
    return np.unique(np.concatenate([np.unique(part) for part in slices]))


def value_mapping(task: Task, label_map: LabelMap) -> Mapping[int, int]:
    """Every value that a label file may hold, with the study's value."""
    if label_map:
        return {0: 0, **dict(label_map)}
    return {0: 0, **{value: value for value in task.labels.values()}}


def load_nifti(path: Path, what: str) -> tuple[NDArray[Any], Affine]:
    """Read a NIfTI file as it is: its (scaled) values, any number of axes, and its affine.

    Raises:
        DataError: not a NIfTI file, cut short, or without a position in space.
    """
    image = open_nifti(path, what)
    try:
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # gzip, zlib, numpy and nibabel each have their own
        raise CaseError(
            "file-truncated",
            f"the {what} file is damaged or cut short ({type(error).__name__})",
            "copy or export it again",
        ) from None
    if array.dtype.fields is not None or np.iscomplexobj(array):
        raise CaseError(
            "voxel-type",
            f"the {what} has colour or complex voxels",
            "export one number a voxel",
        )
    if 0 in array.shape:
        raise CaseError("image-empty", f"the {what} has no voxels", "export it again")
    affine = np.asarray(image.affine, dtype=np.float64)
    check_affine(affine, what)
    return array, affine


def open_nifti(path: Path, what: str) -> Any:
    """Open a NIfTI file without reading its voxels.

    Raises:
        DataError: missing, or not a NIfTI file.
    """
    import nibabel

    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CaseError(
            "file-missing", f"the {what} cannot be opened ({error.strerror})", "supply the file"
        ) from None
    if head.startswith(b"version https://git-lfs"):
        raise CaseError(
            "not-nifti",
            f"the {what} is not a NIfTI (Git LFS pointer?)",
            "fetch the content with `git lfs pull`, or copy the real file",
        )
    try:
        image = nibabel.load(path)
    except EOFError:
        raise CaseError(
            "file-truncated", f"the {what} file is cut short", "copy or export it again"
        ) from None
    except Exception as error:
        raise CaseError(
            "not-nifti",
            f"the {what} is not a NIfTI file ({type(error).__name__})",
            "supply .nii or .nii.gz",
        ) from None
    if not isinstance(image, nibabel.nifti1.Nifti1Pair):
        raise CaseError("not-nifti", f"the {what} is not a NIfTI file", "supply .nii or .nii.gz")
    return image


def is_dicom(path: Path) -> bool:
    """Whether a path is read as DICOM: a folder, or a file with the DICM mark."""
    if path.is_dir():
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _channel(path: Path, channel: Channel, task: Task) -> tuple[NDArray[np.float32], Affine]:
    """One channel, float32 (X, Y, Z), with its affine."""
    what = "image" if len(task.channels) == 1 else f"channel {channel.name}"
    if is_dicom(path):
        from fedseg.imaging import dicom

        series = dicom.read_series(path)
        dicom.check_modality(series, channel.modality, what)
        return series.array, series.affine_ras
    array, affine = load_nifti(path, what)
    return _single(_three_axes(array, task, what)), affine


def _stacked_channels(path: Path, task: Task) -> tuple[NDArray[np.float32], Affine]:
    """All channels from one 4-D file, its last axis first."""
    count = len(task.channels)
    if path.is_dir():
        raise CaseError(
            "channel-count",
            f"the study has {count} channels, the case has one DICOM series",
            "give one series a channel, in the plan's order",
        )
    array, affine = load_nifti(path, "image")
    if array.ndim != 4 or array.shape[3] != count:
        raise CaseError(
            "channel-count",
            f"expected {count} channels, came one image of shape {array.shape}",
            "give one file a channel, or one 4-D file with all of them",
        )
    return np.ascontiguousarray(np.moveaxis(_single(array), 3, 0)), affine


def _single(array: NDArray[Any]) -> NDArray[np.float32]:
    """The array as float32; what does not fit becomes infinite and is refused as such."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32)


def _three_axes(array: NDArray[Any], task: Task, what: str) -> NDArray[Any]:
    """The array with exactly three axes; axes of length one are dropped or added."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2 and task.dimensions == 2:
        array = array[..., np.newaxis]
    if array.ndim != 3:
        more = "; a plan with several channels reads them as channels" if array.ndim == 4 else ""
        raise CaseError(
            "image-axes",
            f"the {what} is {array.ndim}-D with shape {array.shape}, expected three axes",
            f"export one 3-D volume a channel{more}",
        )
    return array


def _read_label(
    case: Case, shape: tuple[int, ...], affine: Affine, task: Task, label_map: LabelMap
) -> NDArray[np.uint8]:
    """The label of a case on the grid of its image."""
    assert case.label is not None
    grid: Shape = (shape[0], shape[1], shape[2])
    if is_dicom(case.label):
        from fedseg.imaging import segmentations

        source = case.images[0] if case.images[0].is_dir() else None
        return segmentations.read_segmentation(
            case.label, task, label_map, affine, grid, source=source
        )
    array, own = load_nifti(case.label, "label")
    label = map_labels(_three_axes(array, task, "label"), task, label_map)
    if case.images[0].is_dir():
        return place(label, own, affine, grid)
    _same_grid(grid, affine, label.shape, own, "label")
    return label


def _same_grid(
    shape: tuple[int, ...], affine: Affine, other: tuple[int, ...], own: Affine, what: str
) -> None:
    """Refuse a label or channel whose grid is not the image's."""
    if shape != other:
        raise CaseError(
            "shape-mismatch",
            f"the image has shape {shape}, the {what} {other}",
            f"is the {what} of another patient or series? export it on the image's grid",
        )
    distance = grid_distance(affine, own, (shape[0], shape[1], shape[2]))
    if distance > VOXEL_TOLERANCE:
        sizes = " x ".join(
            f"{a:.3g}/{b:.3g}" for a, b in zip(spacing_of(affine), spacing_of(own), strict=True)
        )
        raise CaseError(
            "affine-mismatch",
            f"image and {what} have different affines: corners lie up to {distance:.1f} voxels "
            f"apart (spacings {sizes} mm; flipped or shifted?)",
            f"export the {what} on the image's own grid; check left and right before trusting it",
        )
