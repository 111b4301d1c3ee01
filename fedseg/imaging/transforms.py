"""One grid and one intensity scale for every hospital, and the way back to the scanner's own grid.

A volume is turned to RAS (the nearest axes; an oblique grid stays oblique), resampled to the plan's
spacing about the centre of its field of view, and normalised channel by channel. A 2-D task is
resampled in the axial plane only and keeps its slices. Where the spacing already agrees to one part
in a thousand, an axis is not touched: `restore` then undoes `prepare` bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.errors import DataError
from fedseg.imaging.volumes import Volume
from fedseg.task import Channel, Normalisation, Task

SAME_SPACING = 1e-3

Scalar = TypeVar("Scalar", bound=np.generic)
Grid = tuple[tuple[int, ...], NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class PreparedCase:
    """What a network sees of a case.

    Attributes:
        image: float32 (C, X, Y, Z), axes nearest to RAS+, normalised, C-contiguous.
        label: uint8 (X, Y, Z) in the study's values, or None.
        affine_ras: float64 (4, 4), voxel index of this grid -> RAS+ mm.
        spacing_mm: distance between voxels along X, Y and Z.
        annotated: names of the labels that `label` marks; None is all of the plan's.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8] | None
    affine_ras: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]
    annotated: tuple[str, ...] | None = None


def prepare(volume: Volume, task: Task) -> PreparedCase:
    """Reorient, resample and normalise a volume; the volume itself is left as it is.

    Images are interpolated linearly, after a Gaussian of (step - 1) / 2 voxels along axes that get
    coarser; labels are interpolated linearly one by one and the largest share wins.

    Raises:
        DataError: a channel too many or too few, values that are not finite, an image without
            contrast, a label value that the plan does not have, or a degenerate affine.
    """
    _check(volume, task)
    turn = _orientation(volume.affine_ras)
    views = [_turned(channel, turn) for channel in volume.image]
    affine = _turned_affine(volume.affine_ras, turn, volume.image.shape[1:])
    shape, step, offset = _target_grid(views[0].shape, _spacing(affine), task)
    image = np.empty((len(views), *shape), dtype=np.float32)
    for out, view, channel in zip(image, views, task.channels, strict=True):
        _resample(view, step, offset, out)
        _normalise(out, channel, task.normalisation)
    label = None
    if volume.label is not None:
        turned = _turned(volume.label.astype(np.uint8, copy=False), turn)
        label = _resample_labels(turned, step, offset, shape)
    scaling = np.diag([*step, 1.0])
    scaling[:3, 3] = offset
    affine = affine @ scaling
    x, y, z = _spacing(affine)
    return PreparedCase(image, label, affine, (float(x), float(y), float(z)))


def restore(
    mask: NDArray[np.uint8],
    prepared: PreparedCase,
    shape: Sequence[int],
    affine_ras: NDArray[np.float64],
) -> NDArray[np.uint8]:
    """Bring a mask from the prepared grid back to the image's own grid.

    Args:
        mask: uint8 (X, Y, Z) on the grid of `prepared`.
        prepared: the case that the mask belongs to.
        shape: the image's own (X, Y, Z).
        affine_ras: the image's own affine, (4, 4).

    Returns:
        uint8 of `shape`, C-contiguous. Exact where `prepare` did not resample, else label-wise
        linear; voxels outside the prepared grid take its border.

    Raises:
        ValueError: the mask is not on the prepared grid, or the case came from another image.
    """
    if mask.shape != prepared.image.shape[1:]:
        raise ValueError(f"the mask is {mask.shape}, the prepared grid {prepared.image.shape[1:]}")
    turn = _orientation(affine_ras)
    native = _turned_affine(affine_ras, turn, shape)
    back = np.linalg.inv(prepared.affine_ras) @ native
    matrix, offset = back[:3, :3], back[:3, 3]
    step = np.diag(matrix).copy()
    if np.abs(matrix - np.diag(step)).max() > 1e-4 or step.min() <= 0:
        raise ValueError("the prepared case does not come from an image of this affine")
    turned_shape = tuple(int(shape[axis]) for axis in _file_axes(turn))
    grid = _snapped(mask.shape, turned_shape, step, offset)
    ras = _resample_labels(mask.astype(np.uint8, copy=False), *grid, turned_shape)
    to_file = orientations.ornt_transform(_RAS, turn)
    return np.ascontiguousarray(_turned(ras, to_file))


_RAS = np.array([[0, 1], [1, 1], [2, 1]], dtype=np.float64)


def _check(volume: Volume, task: Task) -> None:
    """Refuse what cannot be prepared."""
    channels = len(task.channels)
    if volume.image.ndim != 4 or len(volume.image) != channels or volume.image.size == 0:
        raise DataError(
            f"the plan expects {channels} channel(s) of three axes, the image has shape "
            f"{volume.image.shape}: check the channels of this case in the manifest"
        )
    if not all(np.isfinite(channel).all() for channel in volume.image):
        raise DataError(
            "the image holds values that are not finite (NaN or infinity): export it again, or "
            "replace them with the background's value"
        )
    if volume.label is None:
        return
    if volume.label.shape != volume.image.shape[1:]:
        raise DataError(
            f"the label has shape {volume.label.shape}, its image {volume.image.shape[1:]}: "
            "draw or export the label on the image's own grid"
        )
    low, high = int(volume.label.min()), int(volume.label.max())
    if low < 0 or high > len(task.labels):
        raise DataError(
            f"the label has the value {high if low >= 0 else low}, the plan has 0 to "
            f"{len(task.labels)}: map the values at the site, in its manifest"
        )


def _orientation(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each file axis the nearest RAS axis and its sign, shape (3, 2)."""
    affine = np.asarray(affine, dtype=np.float64)
    if np.isfinite(affine).all() and _volume(affine) > 1e-6 * np.prod(_spacing(affine)) > 0:
        return orientations.io_orientation(affine)  # type: ignore[no-any-return]
    raise DataError(
        "the affine does not span three directions in space: repair the header (sform, qform) or "
        "convert the image from DICOM again"
    )


def _volume(affine: NDArray[np.float64]) -> float:
    """The volume of a voxel, mm³."""
    return float(abs(np.linalg.det(affine[:3, :3])))


def _file_axes(turn: NDArray[np.float64]) -> list[int]:
    """The file axis that lies along R, A and S."""
    return [int(axis) for axis in np.argsort(turn[:, 0])]


def _turned(array: NDArray[Scalar], turn: NDArray[np.float64]) -> NDArray[Scalar]:
    """A view of (X, Y, Z) with its axes in RAS order and direction."""
    return orientations.apply_orientation(array, turn)  # type: ignore[no-any-return]


def _turned_affine(
    affine: NDArray[np.float64], turn: NDArray[np.float64], shape: Sequence[int]
) -> NDArray[np.float64]:
    """The affine that belongs to the turned array."""
    back = orientations.inv_ornt_aff(turn, tuple(shape))
    return np.asarray(np.asarray(affine, np.float64) @ back, dtype=np.float64)


def _spacing(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance between voxels along each axis, mm."""
    return np.asarray(np.linalg.norm(affine[:3, :3], axis=0), dtype=np.float64)


def _target_grid(shape: Sequence[int], spacing: NDArray[np.float64], task: Task) -> Grid:
    """The prepared shape, and source index = step * prepared index + offset, centres aligned."""
    wanted = np.array([*task.spacing_mm, spacing[2]][:3])
    step = wanted / spacing
    step[np.abs(step - 1) <= SAME_SPACING] = 1.0
    size = np.array(shape)
    extent = np.round(size / step, 6)  # so that the affine's rounding errors break no tie
    new = np.maximum(1, np.round(extent)).astype(int)
    return tuple(new.tolist()), step, (size - 1) / 2 - step * (new - 1) / 2


def _snapped(
    source: Sequence[int],
    target: Sequence[int],
    step: NDArray[np.float64],
    offset: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and offsets with rounding errors taken off the axes that were not resampled."""
    same = (np.abs(step - 1) < 1e-6) & (np.abs(offset) < 1e-3) & (np.array(source) == target)
    return np.where(same, 1.0, step), np.where(same, 0.0, offset)


def _untouched(step: NDArray[np.float64], offset: NDArray[np.float64]) -> bool:
    """True where no axis is resampled."""
    return bool((step == 1).all() and (offset == 0).all())


def _resample(
    source: NDArray[np.float32],
    step: NDArray[np.float64],
    offset: NDArray[np.float64],
    out: NDArray[np.float32],
) -> None:
    """Linear interpolation into `out`."""
    if _untouched(step, offset):
        out[...] = source
        return
    if (step > 1).any():
        sigma = np.maximum(0, (step - 1) / 2)
        source = ndimage.gaussian_filter(source, sigma, mode="nearest", output=np.float32)
    _interpolate(source, step, offset, out)


def _interpolate(
    source: NDArray[np.float32],
    step: NDArray[np.float64],
    offset: NDArray[np.float64],
    out: NDArray[np.float32],
) -> None:
    """`source` at step * index + offset, linearly; beyond its border, its border."""
    ndimage.affine_transform(
        source, step, offset, output_shape=out.shape, output=out, order=1, mode="nearest"
    )


def _resample_labels(
    source: NDArray[np.uint8],
    step: NDArray[np.float64],
    offset: NDArray[np.float64],
    shape: tuple[int, ...],
) -> NDArray[np.uint8]:
    """Interpolate each label linearly, only where it lies; the largest share wins, then the lowest.

    Shares add to one, so that the background's is what the labels leave; it yields to a tie.
    """
    if _untouched(step, offset):
        return np.array(source, order="C")
    out = np.zeros(shape, dtype=np.uint8)
    best = np.zeros(shape, dtype=np.float32)
    taken = np.zeros(shape, dtype=np.float32)
    boxes = ndimage.find_objects(source)
    for value, box in enumerate(boxes, start=1):
        if box is None:
            continue
        inner, outer = zip(*map(_reach, box, source.shape, step, offset, shape), strict=True)
        start = np.array([s.start for s in inner]), np.array([s.start for s in outer])
        share = np.empty(best[outer].shape, dtype=np.float32)
        if share.size == 0:
            continue
        own = (source[inner] == value).astype(np.float32)
        _interpolate(own, step, offset + step * start[1] - start[0], share)
        taken[outer] += share
        wins = share > best[outer]
        out[outer][wins] = value
        best[outer][wins] = share[wins]
    out[best < 1 - taken] = 0
    return out


def _reach(
    box: slice, n_source: int, step: float, offset: float, n_target: int
) -> tuple[slice, slice]:
    """A label's extent along one axis with a voxel around it, and the target voxels it touches."""
    low, high = max(0, box.start - 1), min(n_source, box.stop + 1)
    first = 0 if low == 0 else int(np.floor((low - offset) / step))
    last = n_target if high == n_source else int(np.ceil((high - 1 - offset) / step)) + 1
    first = min(max(first, 0), n_target)
    return slice(low, high), slice(first, min(max(last, first), n_target))


def _normalise(image: NDArray[np.float32], channel: Channel, rules: Normalisation) -> None:
    """Bring one channel to the scale of its modality, in place."""
    if channel.modality == "CT":
        assert rules.CT is not None  # the plan checked it
        low, high = rules.CT.window_hu
        np.clip(image, low, high, out=image)
        image -= np.float32((low + high) / 2)
        image /= np.float32((high - low) / 2)
        return
    low, high = np.percentile(image, rules.MR.percentiles).astype(np.float32)
    np.clip(image, low, high, out=image)
    image -= np.float32(image.mean(dtype=np.float64))
    spread = float(np.sqrt(np.square(image).mean(dtype=np.float64)))
    if not spread > 1e-6 * max(abs(low), abs(high)):
        raise DataError(
            f"the channel {channel.name!r} has no contrast between the plan's percentiles "
            f"{rules.MR.percentiles}: it is empty or constant; export it again or leave it out"
        )
    image /= np.float32(spread)
