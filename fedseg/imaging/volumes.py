"""A case in memory: voxels on the file's own grid, and where that grid lies in the patient.

Affines map voxel indices (i, j, k) to millimetres in RAS+ (x to the right, y to the front, z up).
Nothing here interpolates: two grids agree, or one is the other with axes swapped, flipped or
shifted by whole voxels, or they do not fit and the case is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fedseg.imaging.findings import CaseError

Affine = NDArray[np.float64]
Labels = NDArray[np.integer]
Shape = tuple[int, int, int]

VOXEL_TOLERANCE = 0.1
LPS_TO_RAS: Affine = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Volume:
    """One case as it was read.

    Attributes:
        image: float32, shape (C, X, Y, Z), finite; HU for CT, the scanner's units for MR.
        label: uint8, shape (X, Y, Z), the study's values, 0 is background; None if unlabelled.
        affine_ras: float64, shape (4, 4), voxel index to RAS+ mm.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8] | None
    affine_ras: Affine

    @property
    def shape(self) -> Shape:
        """Voxels along the three axes of the file."""
        x, y, z = self.image.shape[1:]
        return x, y, z

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the three axes of the file."""
        return spacing_of(self.affine_ras)


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Length in mm of one step along each voxel axis."""
    x, y, z = (float(n) for n in np.linalg.norm(affine[:3, :3], axis=0))
    return x, y, z


def ras_spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Spacing in mm along x, y and z of the patient: of the voxel axis closest to each."""
    from nibabel.orientations import io_orientation

    spacing = spacing_of(affine)
    axes = io_orientation(affine)[:, 0]
    x, y, z = (spacing[int(np.flatnonzero(axes == anatomical)[0])] for anatomical in range(3))
    return x, y, z


def check_affine(affine: Affine, what: str) -> None:
    """Refuse an affine that is not finite or squeezes space.

    Raises:
        CaseError: not a grid in space.
    """
    square = affine[:3, :3]
    flat = not np.isfinite(affine).all()
    volume = 0.0 if flat else float(np.prod(np.linalg.norm(square, axis=0)))
    if flat or volume == 0 or abs(np.linalg.det(square)) < 1e-4 * volume:
        raise CaseError(
            "affine-singular",
            f"the {what} has no usable position in space (its affine is singular or not finite)",
            "write the header again from the original export",
        )


def grid_distance(a: Affine, b: Affine, shape: Shape) -> float:
    """How far the corners of a grid move, in voxels of the first affine, if b replaces a."""
    ends = [(0, max(n - 1, 0)) for n in shape]
    corners = np.array([(*corner, 1) for corner in product(*ends)], dtype=np.float64).T
    moved = np.linalg.norm(((a - b) @ corners)[:3], axis=0).max()
    return float(moved / min(spacing_of(a)))


def place(
    label: NDArray[np.uint8], affine: Affine, target: Affine, shape: Shape, *, inside: bool = False
) -> NDArray[np.uint8]:
    """Write a label map onto another grid that has the same voxels in another order or extent.

    Args:
        label: shape (x, y, z).
        affine: of the label, to the same world as `target`.
        target: affine of the grid to write on.
        shape: of the grid to write on.
        inside: allow the label to cover only a part of the grid; the rest is background.

    Raises:
        CaseError: the grids differ by more than swaps, flips and whole steps, or foreground lies
            outside.
    """
    transform = np.linalg.inv(target) @ affine
    steps = np.rint(transform[:3, :3])
    reach = np.array(label.shape) - 1
    drift = np.abs(transform[:3, :3] - steps) @ reach
    offset = np.rint(transform[:3, 3])
    drift = drift + np.abs(transform[:3, 3] - offset)
    if not _is_signed_permutation(steps) or (drift > VOXEL_TOLERANCE).any():
        raise _other_grid(label.shape, shape)
    axes = [int(np.flatnonzero(row)[0]) for row in steps]
    turned = np.transpose(label, axes)
    flips = [axis for axis in range(3) if steps[axis].sum() < 0]
    turned = np.flip(turned, tuple(flips))
    start = [
        int(offset[axis]) - (turned.shape[axis] - 1 if axis in flips else 0) for axis in range(3)
    ]
    if not inside and (turned.shape != shape or any(start)):
        raise _other_grid(label.shape, shape)
    return _pasted(turned, start, shape)


def _is_signed_permutation(steps: Affine) -> bool:
    """Exactly one entry of size 1 in every row and column."""
    size = np.abs(steps)
    return bool((size.sum(0) == 1).all() and (size.sum(1) == 1).all())


def _pasted(part: NDArray[np.uint8], start: list[int], shape: Shape) -> NDArray[np.uint8]:
    """The part in a background of `shape`; foreground must not fall outside."""
    result = np.zeros(shape, dtype=np.uint8)
    low = [max(0, -s) for s in start]
    high = [min(n, total - s) for n, total, s in zip(part.shape, shape, start, strict=True)]
    taken = tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))
    kept = part[taken]
    if np.count_nonzero(kept) != np.count_nonzero(part):
        raise CaseError(
            "label-outside",
            "a part of the label lies outside the image",
            "is it the label of another series? export it for this image",
        )
    if kept.size:
        where = tuple(slice(s + t.start, s + t.stop) for s, t in zip(start, taken, strict=True))
        result[where] = kept
    return result


def _other_grid(label: tuple[int, ...], image: Shape) -> CaseError:
    """The label's grid is not the image's."""
    return CaseError(
        "affine-mismatch",
        f"the label (shape {label}) does not lie on the grid of the image (shape {image})",
        "export the label on the image's own grid; fedseg does not resample truth",
    )
