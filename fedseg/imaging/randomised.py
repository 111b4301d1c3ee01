"""Phantoms by domain randomisation: an endless cohort to pre-train a network on without patients.

Anatomy, contrast, neighbours, sharpness, bias field and noise are drawn far beyond what scanners
do, so that a network learns shape and place, which last, and not intensities, which do not (Billot
et al., Med Image Anal 2023, SynthSeg; Hoffmann et al., IEEE TMI 2022, for shapes made of noise).
What is known of an organ without looking at any patient enters through `Anatomy`:

- `chain`: a bent tube along the front-back axis, thicker at places; labels follow each other along
  it, label 1 in front (a hippocampus, a vertebral column, a vessel).
- `apart`: a lump a label, each at a place of its own that varies a little (organs of the abdomen).
- `nested`: label 1 is a lump, and each further label lies inside the one before (organ and tumour).

A case is a pure function of the task, the seed and its number. Cases come out as a network sees
them: through `prepare`, on the plan's grid, normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.arrays import seed_for
from fedseg.imaging.anatomy import turned
from fedseg.imaging.transforms import PreparedCase, prepare
from fedseg.imaging.volumes import Volume
from fedseg.task import Task

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.uint8]
Anatomy = Literal["chain", "apart", "nested"]

BALLS = 25
SLICES = 12
APART = 0.12  # least difference of two greys that are to be told apart, of a range of 1


def randomised_case(
    task: Task, seed: int, number: int, *, anatomy: Anatomy = "chain"
) -> PreparedCase:
    """One phantom, labelled with every label of the task (a small one may be hidden by others).

    Args:
        task: its channels each get a contrast of their own; a 2-D task gets 12 slices.
        seed: of the cohort: where `apart` puts its lumps belongs to it.
        number: of the phantom, from 0.
        anatomy: what the labels look like.
    """
    rng = np.random.default_rng(seed_for(seed, anatomy, number, "randomised phantom"))
    spacing = np.array([*task.spacing_mm, 3 * max(task.spacing_mm)][:3])
    sides = [round(n * rng.uniform(1.0, 1.35)) for n in task.patch_size]
    shape = (*sides, SLICES)[:3]
    points = _points(shape, spacing)
    reach = np.array(shape) * spacing / 2
    bent = _deformed(points, reach, rng)
    kinds = len(task.labels)
    if anatomy == "chain":
        depth, label = _chain(bent, reach, kinds, rng)
    elif anatomy == "apart":
        places = np.random.default_rng(seed_for(seed, anatomy, 0, "layout"))
        depth, label = _lumps(bent, reach, kinds, places, rng)
    else:
        depth, label = _nested(bent, reach, kinds, rng)
    tissue, count = _surroundings(bent, reach, depth, rng)
    tissue = np.where(label > 0, count + label, tissue)
    image = np.stack(
        [
            _in_units(_image(tissue, count, _greys(anatomy, count, kinds, rng), rng), task, c, rng)
            for c in range(len(task.channels))
        ]
    ).astype(np.float32)
    return prepare(Volume(image, label, np.diag([*spacing, 1.0])), task)


def _points(shape: Sequence[int], spacing: Floats) -> Floats:
    """Voxel centres about the origin, (X, Y, Z, 3), mm."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)


def _field(shape: Sequence[int], cells: Sequence[int], rng: np.random.Generator) -> Floats:
    """A smooth random field of mean 0 and variance 1: cubic B-splines over so many cells."""
    field: Floats = rng.standard_normal([c + 3 for c in cells]).astype(np.float32)
    for n, c in zip(shape, cells, strict=True):
        basis = _splines(n, c)
        field = np.tensordot(field, basis, axes=(0, 1))  # the axis done goes last
    return np.ascontiguousarray(field)


def _splines(n: int, cells: int) -> Floats:
    """Cubic B-spline weights (n, cells + 3), each row of length 1."""
    away = np.abs(np.linspace(0, cells, n)[:, None] - (np.arange(cells + 3) - 1)[None])
    near = 2 / 3 - away**2 + away**3 / 2
    far = np.clip(2 - away, 0, None) ** 3 / 6
    weights: Floats = np.where(away < 1, near, far)
    weights = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    return weights.astype(np.float32)


def _deformed(points: Floats, reach: Floats, rng: np.random.Generator) -> Floats:
    """The room turned, moved, stretched and smoothly bent."""
    angles = rng.normal(0, 0.2, 3)
    centred = points + (rng.normal(0, 0.08, 3) * reach).astype(np.float32)
    moved = turned(centred, angles) * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    strength = rng.uniform(0, 0.06) * reach.mean()
    for axis in range(3):
        cells = rng.integers(2, 5, 3).tolist()
        moved[..., axis] += strength * _field(points.shape[:3], cells, rng)
    return moved


def _chain(
    points: Floats, reach: Floats, kinds: int, rng: np.random.Generator
) -> tuple[Floats, Labels]:
    """A bent tube from front to back. Depth in mm, below 0 inside; labels along it."""
    t = np.linspace(0, 1, BALLS)
    size = float(min(reach[0], reach[2]))
    half = reach[1] * rng.uniform(0.5, 0.85)
    bend = rng.normal(0, 0.25, (2, 3)) * size
    shapes = np.stack([(2 * t - 1) ** 2 - 1 / 3, np.sin(2 * pi * t), 2 * t - 1])
    side, up = bend @ shapes
    centres = np.stack([side, half * (1 - 2 * t), up], axis=-1)
    ends = rng.uniform(0.6, 1.5, 4)
    radii = size * rng.uniform(0.16, 0.34) * np.interp(t, np.linspace(0, 1, 4), ends)
    share = rng.dirichlet(np.full(kinds, 12.0))
    borders = np.cumsum(share)[:-1]
    depth, nearest = _balls(points, centres, radii)
    depth = depth + rng.uniform(0, 0.06) * size * _field(points.shape[:3], [6, 8, 6], rng)
    part = 1 + np.searchsorted(borders, t)
    return depth, np.where(depth < 0, part[nearest], 0).astype(np.uint8)


def _lumps(
    points: Floats, reach: Floats, kinds: int, places: np.random.Generator, rng: np.random.Generator
) -> tuple[Floats, Labels]:
    """A lump a label, at its own place."""
    depth = np.full(points.shape[:3], np.inf, np.float32)
    label = np.zeros(points.shape[:3], np.uint8)
    room = places.uniform(-0.65, 0.65, (kinds, 3))
    sizes = places.uniform(0.6, 1.0, kinds) / kinds ** (1 / 3)
    for index in range(kinds):
        centre = (room[index] + rng.normal(0, 0.06, 3)) * reach
        away = _lump(points, centre, reach * sizes[index] * 0.6, rng)
        label[(away < 0) & (away < depth)] = index + 1
        depth = np.minimum(depth, away)
    return depth, label


def _nested(
    points: Floats, reach: Floats, kinds: int, rng: np.random.Generator
) -> tuple[Floats, Labels]:
    """Each label inside the one before."""
    label = np.zeros(points.shape[:3], np.uint8)
    centre, size = rng.normal(0, 0.25, 3) * reach, rng.uniform(0.35, 0.75)
    outer = _lump(points, centre, reach * size, rng)
    inside = outer < 0
    label[inside] = 1
    for index in range(2, kinds + 1):
        size *= rng.uniform(0.35, 0.6)
        centre = centre + rng.normal(0, 0.25, 3) * reach * size
        inside = inside & (_lump(points, centre, reach * size, rng) < 0)
        label[inside] = index
    return outer, label


def _lump(points: Floats, centre: Floats, radii: Floats, rng: np.random.Generator) -> Floats:
    """About the distance in mm to the surface of a bumpy ellipsoid, below 0 inside."""
    radii = radii * rng.uniform(0.7, 1.3, 3)
    room = turned(points - centre.astype(np.float32), rng.normal(0, 0.5, 3))
    length = np.sqrt(((room / radii.astype(np.float32)) ** 2).sum(-1))
    bumps = rng.uniform(0.05, 0.2) * _field(points.shape[:3], rng.integers(3, 7, 3).tolist(), rng)
    found: Floats = (length - 1 + bumps) * np.float32(radii.min())
    return found


def _balls(points: Floats, centres: Floats, radii: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Distance to the surface of a chain of balls, and the ball that is nearest."""
    x, y, z = (np.ascontiguousarray(points[..., axis]) for axis in range(3))
    best = np.full(x.shape, np.inf, np.float32)
    nearest = np.zeros(x.shape, np.intp)
    for index, ((i, j, k), radius) in enumerate(zip(centres, radii, strict=True)):
        away = (x - np.float32(i)) ** 2 + (y - np.float32(j)) ** 2 + (z - np.float32(k)) ** 2
        away = np.sqrt(away, out=away) - np.float32(radius)
        closer = away < best
        np.copyto(best, away, where=closer)
        nearest[closer] = index
    return best, nearest


def _surroundings(
    points: Floats, reach: Floats, depth: Floats, rng: np.random.Generator
) -> tuple[NDArray[np.intp], int]:
    """What lies around the organ, tissue 0, 1, ..., and how many tissues there are.

    Patches of tissue, lumps and tubes; the last tissue looks like the organ, and a rim of another
    may keep it off.
    """
    shape = points.shape[:3]
    count = int(rng.integers(2, 6))
    fields = [_field(shape, rng.integers(2, 7, 3).tolist(), rng) for _ in range(count)]
    tissue = np.argmax(fields, axis=0)
    for _ in range(int(rng.integers(1, 6))):
        kind = count if rng.random() < 0.5 else int(rng.integers(count))
        centre = rng.uniform(-0.9, 0.9, 3) * reach
        if rng.random() < 0.5:
            away = _lump(points, centre, reach * rng.uniform(0.1, 0.4), rng)
        else:
            t = np.linspace(-1, 1, BALLS // 2)[:, None]
            way = rng.normal(0, 1, 3)
            line = centre + reach * (way / np.linalg.norm(way) * t + rng.normal(0, 0.2, 3) * t**2)
            thick = np.full(len(t), reach.min() * rng.uniform(0.05, 0.25))
            away, _ = _balls(points, line, thick)
        tissue[away < 0] = kind
    if rng.random() < 0.6:
        rim = rng.uniform(0, 0.12) * reach.min()
        tissue[(depth < rim) & (tissue == count)] = int(rng.integers(count))
    return tissue, count


def _greys(anatomy: Anatomy, count: int, kinds: int, rng: np.random.Generator) -> Floats:
    """A grey value for each tissue around, for what looks like the organ, and for each label.

    Parts of a chain look much the same; what lies inside something else does not.
    """
    organ = rng.uniform(0, 1)
    around = [_other([organ], rng) for _ in range(count)]
    if anatomy == "nested":
        labels = [organ]
        while len(labels) < kinds:
            labels.append(_other(labels[-1:], rng))
    else:
        labels = (organ + rng.normal(0, rng.choice([0.0, 0.08]), kinds)).tolist()
    return np.array([*around, organ, *labels], np.float32)


def _other(greys: Sequence[float], rng: np.random.Generator) -> float:
    """A grey value that can be told from these."""
    while True:
        found = float(rng.uniform(0, 1))
        if all(abs(found - grey) >= APART for grey in greys):
            return found


def _image(tissue: NDArray[np.intp], count: int, grey: Floats, rng: np.random.Generator) -> Floats:
    """One channel: grey values, texture, point spread, bias field, noise; about 0 to 1."""
    shape = tissue.shape
    image: Floats = grey[tissue]
    texture = np.abs(rng.normal(0, 0.06, len(grey))).astype(np.float32)
    texture[count:] = texture[count]  # an organ and what looks like it
    fine = [max(2, n // int(rng.integers(2, 6))) for n in shape]
    image = image + texture[tissue] * _field(shape, fine, rng)
    width = rng.uniform(0.2, 0.9) * rng.uniform(0.6, 1.4, 3)
    image = ndimage.gaussian_filter(image, width, mode="nearest")
    image = np.clip(image, 0, None) ** rng.uniform(0.7, 1.4)
    cells = rng.integers(1, 4, 3).tolist()
    image = image * np.exp(rng.uniform(0, 0.3) * _field(shape, cells, rng))
    noise = rng.uniform(0.0, 0.1) * rng.standard_normal((2, *shape), dtype=np.float32)
    return np.asarray(np.hypot(image + noise[0], noise[1]), np.float32)


def _in_units(image: Floats, task: Task, index: int, rng: np.random.Generator) -> Floats:
    """MR as it is; CT spread over the plan's window in HU and a little beyond."""
    window = task.normalisation.CT
    if task.channels[index].modality == "MR" or window is None:
        return image
    low, high = window.window_hu
    beyond = rng.uniform(0, 0.3, 2) * (high - low)
    spread: Floats = (low - beyond[0]) + image * (high - low + beyond.sum())
    return spread
