"""Which patient trains next, and which patch of which of its cases.

Patients come first: whoever has more cases, slices or voxels is not drawn more often. Patients are
drawn in shuffles that run through the whole study, so that a site's patients take equal turns over
many short rounds. Patches are drawn in a window of voxels; what lies outside the image is zero, as
in inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedseg.arrays import seed_for
from fedseg.errors import DataError

if TYPE_CHECKING:
    from fedseg.imaging.transforms import PreparedCase

MAX_VOXELS = 20_000

Scalar = TypeVar("Scalar", bound=np.generic)
Window = tuple[int, int, int]
Patients = Mapping[str, Sequence["PreparedCase"]]


def window(sides: tuple[int, ...], slices: int) -> Window:
    """The sides along X, Y and Z; a 2-D task's along Z are given."""
    x, y, z = (*sides, slices)[:3]
    return x, y, z


def draw_patients(
    names: Sequence[str], *, first: int, count: int, seed: int, site: str
) -> list[str]:
    """The turns first, ..., first + count - 1 of an endless series of shuffles of the patients.

    In every len(names) turns of one shuffle each patient has exactly one. The series depends on
    seed, site and the set of names alone.
    """
    ordered = sorted(names)
    turns: list[str] = []
    shuffle, skip = divmod(first, len(ordered))
    while len(turns) < skip + count:
        rng = np.random.default_rng(seed_for(seed, site, shuffle, "patients"))
        turns += [ordered[i] for i in rng.permutation(len(ordered))]
        shuffle += 1
    return turns[skip : skip + count]


@dataclass(frozen=True)
class Patch:
    """A part of a case.

    Attributes:
        image: float32 (C, X, Y, Z).
        label: uint8 (X, Y, Z), values of the study.
        annotated: names of the labels that `label` marks; None is all of the plan's.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    annotated: tuple[str, ...] | None


class PatchSampler:
    """Draws patches of a site's patients; remembers where the labels of a case lie.

    Args:
        patients: prepared, labelled cases by patient.
        patch: voxels along X, Y and Z (Z is 1 for a 2-D task) that the network will see.
        margin: voxels that are cut besides on each side, for a rotation to draw from.
        foreground_share: probability that the patch is placed around a labelled voxel.
    """

    def __init__(
        self, patients: Patients, patch: Window, margin: Window, foreground_share: float
    ) -> None:
        self._patients = patients
        self._patch = patch
        self._margin = margin
        self._share = foreground_share
        self._voxels: dict[tuple[str, int], tuple[NDArray[np.intp], ...]] = {}

    def draw(
        self, patient: str, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """A patch of one of the patient's cases, all equally likely.

        Returns:
            image float32 (C, *size) and label uint8 (*size), where size = patch + 2 * margin.

        Raises:
            DataError: a case without a label map.
        """
        patch = self.patch(patient, rng)
        return patch.image, patch.label

    def patch(self, patient: str, rng: np.random.Generator) -> Patch:
        """The same as `draw`, with the labels that the case is annotated with."""
        cases = self._patients[patient]
        index = int(rng.integers(len(cases)))
        case = cases[index]
        if case.label is None:
            raise DataError(
                "a training case has no label map: label it, or leave it out of the train split"
            )
        if (patient, index) not in self._voxels:
            self._voxels[patient, index] = labelled_voxels(case.label)
        voxels = self._voxels[patient, index]
        start = place_window(case.label.shape, self._patch, voxels, self._share, rng)
        x, y, z = (s - m for s, m in zip(start, self._margin, strict=True))
        a, b, c = (p + 2 * m for p, m in zip(self._patch, self._margin, strict=True))
        begin, size = (x, y, z), (a, b, c)
        return Patch(cut(case.image, begin, size), cut(case.label, begin, size), case.annotated)


def labelled_voxels(label: NDArray[np.uint8]) -> tuple[NDArray[np.intp], ...]:
    """Flat indices of the voxels of each label that is present, evenly thinned out where many."""
    flat = np.flatnonzero(label)
    values = label.reshape(-1)[flat]
    found = (flat[values == value] for value in np.unique(values))
    return tuple(voxels[:: 1 + len(voxels) // MAX_VOXELS] for voxels in found)


def place_window(
    shape: tuple[int, ...],
    size: Window,
    voxels: Sequence[NDArray[np.intp]],
    foreground_share: float,
    rng: np.random.Generator,
) -> Window:
    """First voxel of a window inside an image of (X, Y, Z), negative where the image is smaller.

    With probability `foreground_share` it lies around a voxel of one of the labels, each equally
    likely, moved inwards at the border; else anywhere.
    """
    room = [n - s for n, s in zip(shape, size, strict=True)]
    if len(voxels) and rng.random() < foreground_share:
        own = voxels[int(rng.integers(len(voxels)))]
        centre = np.unravel_index(own[int(rng.integers(len(own)))], shape)
        wanted = [int(c) - s // 2 for c, s in zip(centre, size, strict=True)]
    else:
        wanted = [int(rng.integers(max(r, 0) + 1)) for r in room]
    x, y, z = (min(max(w, 0), r) if r >= 0 else r // 2 for w, r in zip(wanted, room, strict=True))
    return x, y, z


def cut(array: NDArray[Scalar], start: Window, size: Window) -> NDArray[Scalar]:
    """The window of an array (..., X, Y, Z), zero where it reaches beyond it; always a copy."""
    out = np.zeros((*array.shape[:-3], *size), array.dtype)
    sides = [
        _overlap(first, length, n)
        for first, length, n in zip(start, size, array.shape[-3:], strict=True)
    ]
    (x, to_x), (y, to_y), (z, to_z) = sides
    out[..., to_x, to_y, to_z] = array[..., x, y, z]
    return out


def _overlap(first: int, length: int, n: int) -> tuple[slice, slice]:
    """Where a window of one axis meets the image: in the image, and in the window."""
    low = max(first, 0)
    high = max(min(first + length, n), low)
    return slice(low, high), slice(low - first, high - first)
