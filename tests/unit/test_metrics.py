"""Metrics against numbers computed by hand, and against surface-distance."""

from __future__ import annotations

import warnings
from math import hypot, pi

import numpy as np
import pytest
from numpy.typing import NDArray

from fedseg.evaluation.metrics import score_case, score_patient
from fedseg.measures import Metric

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import surface_distance

ALL: tuple[Metric, ...] = ("dice", "hd95", "nsd")
Mask = NDArray[np.uint8]


def box(shape: tuple[int, ...], *sides: tuple[int, int], value: int = 1) -> Mask:
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(*side) for side in sides)] = value
    return mask


def ball(shape: tuple[int, int, int], centre: tuple[float, ...], radius: float) -> Mask:
    grid = np.indices(shape).astype(float)
    away = sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True))
    return (np.sqrt(away) <= radius).astype(np.uint8)


def score(
    a: Mask, b: Mask, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), tolerance: float = 1.0
) -> dict[str, float | None]:
    scores = score_case(a, b, spacing, {"x": 1}, ALL, tolerance)
    return {metric: labels["x"] for metric, labels in scores.items()}


def test_a_box_shifted_by_two_voxels() -> None:
    """Both are 6 long and share 4 along X: Dice is 2 * 4 / (6 + 6), the far faces are 2 mm off."""
    a = box((12, 10, 10), (2, 8), (2, 8), (2, 8))
    b = box((12, 10, 10), (4, 10), (2, 8), (2, 8))
    found = score(a, b)
    assert found["dice"] == pytest.approx(4 / 6)
    assert found["hd95"] == pytest.approx(2.0)
    assert score(a, b, (3.0, 1.0, 1.0))["hd95"] == pytest.approx(6.0)
    assert score(a, b, tolerance=2.0)["nsd"] == pytest.approx(1.0)
    near = found["nsd"]
    assert near is not None and 0.5 < near < 1


def test_hd95_is_a_percentile_of_border_voxels() -> None:
    """One stray voxel of 217 border voxels does not count, a hundred times as many do."""
    a = box((30, 20, 20), (2, 8), (2, 8), (2, 8))
    b = a.copy()
    b[25, 5, 5] = 1
    assert score(b, a)["hd95"] == 0.0
    b[15:25, 2:12, 2:12] = 1
    hd95 = score(b, a)["hd95"]
    assert hd95 is not None and hd95 > 10


def test_labels_are_measured_one_by_one() -> None:
    truth = box((8, 8, 8), (1, 4), (1, 7), (1, 7)) + box((8, 8, 8), (4, 7), (1, 7), (1, 7), value=2)
    swapped = np.where(truth > 0, 3 - truth, 0).astype(np.uint8)
    scores = score_case(swapped, truth, (1, 1, 1), {"a": 1, "b": 2}, ("dice",), 1.0)
    assert scores == {"dice": {"a": 0.0, "b": 0.0}}


def test_the_rule_for_empty_masks() -> None:
    shape, spacing = (4, 6, 12), (1.0, 2.0, 0.5)
    empty, full = np.zeros(shape, np.uint8), box(shape, (1, 3), (1, 3), (1, 3))
    diagonal = hypot(4, 12, 6)
    assert score(empty, empty, spacing) == {"dice": None, "hd95": None, "nsd": None}
    for a, b in ((empty, full), (full, empty)):
        assert score(a, b, spacing) == {"dice": 0.0, "hd95": diagonal, "nsd": 0.0}


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 2.5)])
@pytest.mark.parametrize("tolerance", [0.5, 1.0, 2.0])
def test_nsd_agrees_with_surface_distance(
    spacing: tuple[float, float, float], tolerance: float
) -> None:
    a = ball((18, 16, 14), (8, 8, 7), 5.2)
    b = ball((18, 16, 14), (9, 7, 7), 4.7)
    b[0:2, 0:3, 0:2] = 1  # touches the border of the image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        surfaces = surface_distance.compute_surface_distances(a > 0, b > 0, spacing)
    expected = surface_distance.compute_surface_dice_at_tolerance(surfaces, tolerance)
    assert score(b, a, spacing, tolerance)["nsd"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.8)])
def test_one_slice_is_measured_as_a_plane(spacing: tuple[float, float]) -> None:
    a = ball((20, 18, 1), (9, 8, 0), 6.1)
    b = ball((20, 18, 1), (10, 8, 0), 5.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        surfaces = surface_distance.compute_surface_distances(a[..., 0] > 0, b[..., 0] > 0, spacing)
    expected = surface_distance.compute_surface_dice_at_tolerance(surfaces, 0.9)
    found = score(b, a, (*spacing, 5.0), 0.9)
    assert found["nsd"] == pytest.approx(expected, abs=1e-6)
    assert score(a, np.zeros_like(a), (*spacing, 5.0))["hd95"] == pytest.approx(
        hypot(20 * spacing[0], 18 * spacing[1])
    )
    assert found["hd95"] is not None and found["hd95"] < 3


def test_a_flat_label_in_a_volume_is_no_plane() -> None:
    """Both faces of the disc are surface: 1 mm off along Z is within 1 mm everywhere."""
    a, b = (box((9, 9, 9), (2, 7), (2, 7), (z, z + 1)) for z in (4, 5))
    found = score(a, b, (1.0, 1.0, 1.0))
    assert found == {"dice": 0.0, "hd95": 1.0, "nsd": 1.0}
    assert score(a, b, (1.0, 1.0, 4.0))["hd95"] == pytest.approx(4.0)


def test_concentric_balls_are_apart_by_their_radii() -> None:
    a, b = (ball((41, 41, 41), (20, 20, 20), r) for r in (15, 12))
    found = score(a, b)
    assert found["hd95"] == pytest.approx(3.0, abs=0.7)
    assert found["dice"] == pytest.approx(2 * 12**3 / (12**3 + 15**3), abs=0.01)
    assert found["nsd"] is not None and found["nsd"] < 0.05
    assert a.sum() == pytest.approx(4 / 3 * pi * 15**3, rel=0.02)


def test_only_what_is_asked_for_is_computed() -> None:
    a = box((4, 4, 4), (1, 3), (1, 3), (1, 3))
    assert score_case(a, a, (1, 1, 1), {"x": 1}, ("dice",), 1.0) == {"dice": {"x": 1.0}}
    with pytest.raises(ValueError, match="cannot be compared"):
        score_case(a, a[1:], (1, 1, 1), {"x": 1}, ("dice",), 1.0)


def test_a_patients_cases_are_averaged_label_by_label() -> None:
    cases: list[dict[Metric, dict[str, float | None]]] = [
        {"dice": {"a": 0.5, "b": None, "c": None}, "hd95": {"a": 2.0, "b": None, "c": None}},
        {"dice": {"a": 0.7, "b": 0.2, "c": None}, "hd95": {"a": 4.0, "b": 9.0, "c": None}},
    ]
    scores = score_patient("A", "p", cases)
    assert scores.dice == {"a": pytest.approx(0.6), "b": 0.2, "c": None}
    assert scores.hd95_mm == {"a": 3.0, "b": 9.0, "c": None}
    assert scores.nsd == {} and scores.cases == 2
    assert scores.mean_dice == pytest.approx(0.4)
