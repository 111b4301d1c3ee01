"""Laws that hold for the metrics of any two masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray

from fedseg.evaluation.metrics import score_case
from fedseg.measures import Metric

ALL: tuple[Metric, ...] = ("dice", "hd95", "nsd")
SPACING = (1.0, 0.5, 2.0)


@st.composite
def masks(draw: st.DrawFn, count: int = 2) -> list[NDArray[np.uint8]]:
    shape = draw(st.tuples(*(st.integers(1, 6) for _ in range(3))))
    values = st_numpy.arrays(np.uint8, shape, elements=st.integers(0, 1), fill=st.just(0))
    return [draw(values) for _ in range(count)]


def score(a: Any, b: Any, spacing: Any = SPACING, tolerance: float = 0.8) -> list[float | None]:
    scores = score_case(a, b, spacing, {"x": 1}, ALL, tolerance)
    return [scores[metric]["x"] for metric in ALL]


def same(first: list[float | None], second: list[float | None]) -> bool:
    return [f and pytest.approx(f, rel=1e-5) for f in first] == second


@settings(max_examples=30, deadline=None)
@given(masks())
def test_it_does_not_matter_which_mask_is_the_truth(pair: list[NDArray[np.uint8]]) -> None:
    a, b = pair
    assert same(score(a, b), score(b, a))


@settings(max_examples=30, deadline=None)
@given(masks())
def test_scores_are_in_their_bounds(pair: list[NDArray[np.uint8]]) -> None:
    a, b = pair
    dice, hd95, nsd = score(a, b)
    if not (a.any() or b.any()):
        assert dice is hd95 is nsd is None
        return
    assert dice is not None and hd95 is not None and nsd is not None
    assert 0 <= dice <= 1 and 0 <= nsd <= 1 + 1e-6
    assert 0 <= hd95 <= np.linalg.norm(np.array(a.shape) * SPACING) + 1e-6


@settings(max_examples=20, deadline=None)
@given(masks(1))
def test_a_mask_agrees_with_itself(only: list[NDArray[np.uint8]]) -> None:
    (a,) = only
    assert score(a, a) == ([1.0, 0.0, 1.0] if a.any() else [None] * 3)


@settings(max_examples=30, deadline=None)
@given(masks(), st.sets(st.integers(0, 2), min_size=1))
def test_a_mirror_changes_nothing(pair: list[NDArray[np.uint8]], axes: set[int]) -> None:
    a, b = pair
    mirrored = (np.flip(mask, tuple(axes)) for mask in pair)
    assert same(score(a, b), score(*mirrored))


@settings(max_examples=20, deadline=None)
@given(masks(), st.floats(0.25, 4))
def test_millimetres_scale_with_the_grid(pair: list[NDArray[np.uint8]], factor: float) -> None:
    a, b = pair
    dice, hd95, nsd = score(a, b)
    wide = score(a, b, tuple(factor * s for s in SPACING), 0.8 * factor)
    assert same([dice, hd95 and hd95 * factor, nsd], wide)
