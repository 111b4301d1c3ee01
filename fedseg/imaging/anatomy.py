"""The made-up anatomy inside a phantom: a function from points in space to tissue and label.

One organ, bent, thick at its head; around it things that look like it. All lengths are in mm, the
origin is the middle of the field of view, axes are RAS+. `rng` holds what makes a patient: the same
generator state gives the same body, on whatever grid it is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, sin
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

PARENCHYMA, GREY, FLUID = range(3)
BACKGROUND, HEAD, BODY = range(3)


@dataclass(frozen=True)
class Organ:
    """A chain of balls from the tip of the head to the end of the tail.

    Attributes:
        centres: (N, 3), mm.
        radii: (N,), mm.
        first_of_body: the ball at which the body begins: where the head has half narrowed.
    """

    centres: Floats
    radii: Floats
    first_of_body: int


def draw_anatomy(
    points: Floats, rng: np.random.Generator, size: float
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One patient.

    Args:
        points: (X, Y, Z, 3), mm; float32 is exact enough and fast.
        rng: the patient.
        size: 1 for an organ of about 32 mm in a field of view of 40 mm.

    Returns:
        Tissue (PARENCHYMA, GREY or FLUID) and label (BACKGROUND, HEAD or BODY), uint8 (X, Y, Z).
        The whole organ is GREY, and so are its neighbours.
    """
    points = _posed(points, rng) / (size * rng.uniform(0.88, 1.12))
    organ = _organ(rng)
    distance, nearest = _distance(points, organ.centres, organ.radii)
    inside = distance + 0.5 * waves(points, rng, 9) < 0
    tissue = np.full(inside.shape, PARENCHYMA, dtype=np.uint8)
    tissue[waves(points, rng, 13) > 1.5] = GREY
    for centres, radii, kind in _neighbours(organ, rng):
        away, _ = _distance(points, centres, radii)
        tissue[away + 0.5 * waves(points, rng, 9) < 0] = kind
    tissue[~inside & (distance < rng.uniform(0.0, 1.0))] = PARENCHYMA
    tissue[inside] = GREY
    label = np.where(nearest < organ.first_of_body, HEAD, BODY).astype(np.uint8)
    label[~inside] = BACKGROUND
    return tissue, label


def waves(points: Floats, rng: np.random.Generator, length_mm: float, count: int = 12) -> Floats:
    """A smooth random field of mean 0 and variance 1: plane waves of about this length."""
    vectors = rng.normal(size=(count, 3))
    vectors *= 2 * np.pi / length_mm / np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors *= rng.uniform(0.6, 1.4, (count, 1))
    total: Floats = np.zeros(points.shape[:-1], dtype=points.dtype)
    x, y, z = (np.ascontiguousarray(points[..., axis]) for axis in range(3))
    phases = rng.uniform(0, 2 * np.pi, count)
    for (i, j, k), phase in zip(vectors.tolist(), phases.tolist(), strict=True):
        total += np.cos(i * x + j * y + k * z + phase)
    total *= np.sqrt(2 / count)
    return total


def turned(points: Floats, angles: Floats) -> Floats:
    """Points turned about x, y, then z by angles in radians."""
    for axis, angle in enumerate(angles):
        i, j = (k for k in range(3) if k != axis)
        moved = points.copy()
        moved[..., i] = cos(angle) * points[..., i] - sin(angle) * points[..., j]
        moved[..., j] = sin(angle) * points[..., i] + cos(angle) * points[..., j]
        points = moved
    return points


def _posed(points: Floats, rng: np.random.Generator) -> Floats:
    """The room as the patient's own frame: moved, turned and, for a left organ, mirrored."""
    moved = points + rng.normal(0, 2.0, 3).astype(points.dtype)
    points = turned(moved, rng.normal(0, 0.25, 3))
    points[..., 0] *= rng.choice([-1.0, 1.0])
    return points


def _organ(rng: np.random.Generator) -> Organ:
    """Bend, thickness and the place of the neck vary between patients."""
    t = np.linspace(0, 1, 33)
    neck = rng.uniform(0.16, 0.36)
    bend, arch, hook = rng.normal([5.0, 3.0, 2.0], [2.0, 2.0, 1.5])
    centres = np.stack(
        [
            bend * (2 * t - 1) ** 2 - bend / 2,
            14 - 27 * t,
            arch * np.sin(np.pi * t) - arch / 2 - hook * np.exp(-((t / 0.2) ** 2)),
        ],
        axis=-1,
    )
    swelling = 1 / (1 + np.exp((t - neck) / 0.03))
    radii = rng.uniform(4.2, 5.4) * (1 - 0.3 * t) + rng.uniform(1.8, 3.2) * swelling
    return Organ(centres, radii, int(np.searchsorted(t, neck)))


def _neighbours(organ: Organ, rng: np.random.Generator) -> list[tuple[Floats, Floats, int]]:
    """A ball at the head, a tube along the organ, a ventricle above it: centres, radii, tissue."""
    ball = rng.uniform(3.5, 6.0)
    gap = organ.radii[0] + ball + rng.uniform(-0.5, 1.5)
    way = turned(np.array([0.0, 0.75, 0.66]), rng.normal(0, 0.4, 3))
    width = rng.uniform(2.2, 3.6)
    side = turned(np.array([-0.8, 0.0, -0.6]), rng.normal(0, 0.4, 3))
    along = organ.centres + side * (organ.radii + width + rng.uniform(0.6, 2.0))[:, None]
    along = along[::2]
    above = turned(np.array([0.7, 0.0, 0.7]), rng.normal(0, 0.4, 3))
    room = (organ.centres + above * (organ.radii + 2.0)[:, None])[::2]
    return [
        (room, np.full(len(room), rng.uniform(0.8, 2.4)), FLUID),
        (along, np.full(len(along), width), GREY),
        ((organ.centres[0] + way * gap)[None], np.array([ball]), GREY),
    ]


def _distance(points: Floats, centres: Floats, radii: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Distance to the surface of a chain of balls, below 0 inside, and the ball that is nearest."""
    best = np.full(points.shape[:-1], np.inf, dtype=points.dtype)
    nearest = np.zeros(points.shape[:-1], dtype=np.intp)
    x, y, z = (np.ascontiguousarray(points[..., axis]) for axis in range(3))
    balls = zip(centres.tolist(), radii.tolist(), strict=True)
    for index, ((i, j, k), radius) in enumerate(balls):
        away = np.sqrt((x - i) ** 2 + (y - j) ** 2 + (z - k) ** 2) - radius
        closer = away < best
        np.copyto(best, away, where=closer)
        nearest[closer] = index
    return best, nearest
