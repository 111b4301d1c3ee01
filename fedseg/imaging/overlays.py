"""Pictures of a case: three planes with its labels drawn over them, as small PNGs.

Radiological convention: the patient's right is on the left of axial and coronal pictures, front
and head are up. Voxels are shown at their true proportions; nothing is smoothed.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray

from fedseg.imaging.volumes import Volume

# Okabe and Ito's colours, which stay apart for colour-blind readers.
PALETTE = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")
FILL = 0.30
Picture = NDArray[np.float32]


def colour_of(value: int) -> str:
    """The colour of a label value, as #rrggbb."""
    return PALETTE[(value - 1) % len(PALETTE)]


def overlay_png(volume: Volume, *, planar: bool = False, side: int = 168) -> str:
    """Three planes of a case beside each other.

    Args:
        volume: its first channel is shown, between the 1st and 99th percentile.
        planar: show three slices along the third axis of the file instead (2-D tasks).
        side: of each of the three squares in pixels.

    Returns:
        A PNG as a data URI.
    """
    image, label, spacing = _upright(volume, planar=planar)
    low, high = np.percentile(image[:: max(1, image.shape[0] // 64)], (1, 99))
    grey = np.clip((image - low) / max(float(high - low), 1e-6), 0, 1)
    planes = _slices(label) if planar else _planes(label)
    panels = []
    for axis, index in planes:
        mask = np.take(label, index, axis)
        ratio = np.delete(np.array(spacing), axis)
        panels.append(_panel(np.take(grey, index, axis), mask, ratio, side))
    gap = np.ones((side, 4, 3), dtype=np.float32)
    row = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
    return _data_uri(row)


def _upright(
    volume: Volume, *, planar: bool
) -> tuple[Picture, NDArray[np.uint8], tuple[float, ...]]:
    """Image, label and spacing along x to the right, y to the front, z up."""
    from nibabel.orientations import apply_orientation, io_orientation

    image = volume.image[0]
    label = volume.label if volume.label is not None else np.zeros(image.shape, dtype=np.uint8)
    if planar:
        return image, label, volume.spacing_mm
    turn = io_orientation(volume.affine_ras)
    spacing = [0.0, 0.0, 0.0]
    for axis in range(3):
        spacing[int(turn[axis, 0])] = volume.spacing_mm[axis]
    return (
        apply_orientation(image, turn),
        apply_orientation(label, turn),
        tuple(spacing),
    )


def _planes(label: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Axial, coronal and sagittal slice with the most foreground; the middle if there is none."""
    planes = []
    for axis in (2, 1, 0):
        others = tuple(a for a in range(3) if a != axis)
        counts = np.count_nonzero(label, axis=others)
        best = int(np.argmax(counts)) if counts.any() else label.shape[axis] // 2
        planes.append((axis, best))
    return planes


def _slices(label: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Up to three slices along the third axis with the most foreground, in order."""
    counts = np.count_nonzero(label, axis=(0, 1))
    best = np.argsort(-counts, kind="stable")[:3]
    return [(2, int(index)) for index in sorted(best)]


def _panel(
    grey: Picture, mask: NDArray[np.uint8], spacing: NDArray[np.float64], side: int
) -> Picture:
    """One slice as RGB (side, side, 3), the first axis leftward and the second upward."""
    extent = np.array(grey.shape) * spacing
    width, height = (max(1, round(side * float(e / extent.max()))) for e in extent)
    columns = ((np.arange(width) + 0.5) * grey.shape[0] / width).astype(int)
    rows = ((np.arange(height) + 0.5) * grey.shape[1] / height).astype(int)
    pick = np.ix_(grey.shape[0] - 1 - columns, grey.shape[1] - 1 - rows)
    shown, labels = grey[pick].T, mask[pick].T
    rgb = np.repeat(shown[..., np.newaxis], 3, axis=2).astype(np.float32)
    for value in np.unique(labels[labels > 0]):
        inside = labels == value
        colour = np.array([int(colour_of(int(value))[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        rgb[inside] = (1 - FILL) * rgb[inside] + FILL * colour
        rgb[inside & ~_eroded(inside)] = colour
    panel = np.zeros((side, side, 3), dtype=np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    panel[top : top + height, left : left + width] = rgb
    return panel


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask less its outermost pixels."""
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _data_uri(rgb: Picture) -> str:
    """An RGB picture in [0, 1] as a PNG data URI."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, np.clip(rgb, 0, 1), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
