"""Calibration on foreground voxels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.evaluation.calibration import (
    BINS,
    calibration,
    calibration_error,
    reliability,
    together,
)


def of(confidence: list[float], right: list[bool]) -> tuple:
    all_ = np.ones(len(confidence), bool)
    return reliability(np.array(confidence, np.float64), np.array(right), all_)


def test_hand_computed() -> None:
    bins = of([0.95, 0.95, 0.55, 0.55], [True, False, True, True])
    assert calibration_error(bins) == pytest.approx((2 * 0.45 + 2 * 0.45) / 4)
    assert [b.voxels for b in bins] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]


def test_the_upper_edge_belongs_to_its_bin_and_others_do_not_count() -> None:
    counted = np.array([True, True, False])
    bins = reliability(np.array([0.5, 1.0, 0.7]), np.array([True, True, False]), counted)
    assert bins[4].voxels == 1 and bins[9].voxels == 1 and bins[6].voxels == 0
    assert calibration_error(of([], [])) is None


def test_patients_count_the_same_however_large() -> None:
    small, large = of([0.9] * 2, [True, False]), of([0.9] * 10, [True] * 10)
    found = calibration("global", [small, large])
    assert found.error.mean == pytest.approx((0.4 + 0.1) / 2)
    assert found.overconfident.mean == pytest.approx((0.4 - 0.1) / 2)
    filled = found.bins[8]
    assert filled.share == 1.0 and filled.accuracy == pytest.approx(0.75)
    assert filled.confidence == pytest.approx(0.9)
    assert found.bins[0].confidence is None
    assert together([small, large]) == of([0.9] * 12, [True, False] + [True] * 10)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), min_size=1, max_size=60))
def test_agrees_with_bins_filled_one_by_one(voxels: list[tuple[float, bool]]) -> None:
    sure = np.array([c for c, _ in voxels])
    right = np.array([r for _, r in voxels])
    expected = 0.0
    for i in range(BINS):
        own = [k for k, c in enumerate(sure) if np.ceil(c * BINS) - 1 == i]
        if own:
            gap = abs(np.mean(sure[own]) - np.mean(right[own]))
            expected += len(own) / len(sure) * gap
    found = calibration_error(reliability(sure, right, np.ones(len(sure), bool)))
    assert found == pytest.approx(expected, abs=1e-9)
