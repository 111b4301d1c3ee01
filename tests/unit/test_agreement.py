"""Bland-Altman analysis, against hand-computed numbers and their textbook formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedseg.evaluation.agreement import volume_agreement

TRUTH = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
PREDICTED = [11.0, 19.0, 32.0, 40.0, 53.0, 61.0]


def test_hand_computed() -> None:
    found = volume_agreement("global", "head", TRUTH, PREDICTED)
    assert found.bias_ml.mean == pytest.approx(1.0)
    assert found.bias_percent.mean == pytest.approx(100 / 35)
    deviation = np.sqrt((0 + 4 + 1 + 1 + 4 + 0) / 5)
    assert found.lower_limit_ml == pytest.approx(1 - 1.96 * deviation)
    assert found.upper_limit_ml == pytest.approx(1 + 1.96 * deviation)
    half = 2.570582 * deviation / np.sqrt(6)
    assert found.bias_ml.low == pytest.approx(1 - half)
    assert found.bias_ml.high == pytest.approx(1 + half)
    of_limits = 2.570582 * deviation * np.sqrt(1 / 6 + 1.96**2 / 10)
    assert found.limits_half_width_ml == pytest.approx(of_limits)


def test_a_bias_that_grows_with_size_has_a_slope() -> None:
    grown = volume_agreement("global", "head", TRUTH, [1.1 * ml for ml in TRUTH])
    assert grown.slope.mean == pytest.approx(0.1 / 1.05)
    line = np.polyfit((np.array(TRUTH) + PREDICTED) / 2, np.subtract(PREDICTED, TRUTH), 1)
    found = volume_agreement("global", "head", TRUTH, PREDICTED).slope
    assert found.mean == pytest.approx(line[0])
    assert found.low is not None and found.low < line[0]


def test_five_patients_have_a_bias_and_nothing_else() -> None:
    found = volume_agreement("global", "head", TRUTH[:5], PREDICTED[:5])
    assert found.bias_ml.mean == pytest.approx(1.0) and found.bias_ml.low is None
    assert found.lower_limit_ml is None and found.limits_half_width_ml is None
    assert found.slope.mean is None


def test_without_any_true_volume_there_are_no_percent() -> None:
    assert volume_agreement("global", "head", [0.0] * 6, [1.0] * 6).bias_percent.mean is None
    assert volume_agreement("global", "head", [], []).bias_ml.patients == 0
    with pytest.raises(ValueError, match="6 true volumes"):
        volume_agreement("global", "head", TRUTH, PREDICTED[:3])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 100)), min_size=6, max_size=15),
    st.floats(-5, 5),
)
def test_a_shift_of_all_predictions_shifts_bias_and_limits(
    pairs: list[tuple[float, float]], shift: float
) -> None:
    truth, predicted = (list(column) for column in zip(*pairs, strict=True))
    before = volume_agreement("a", "x", truth, predicted)
    after = volume_agreement("a", "x", truth, [p + shift for p in predicted])
    assert before.bias_ml.mean is not None and before.bias_ml.low is not None
    assert before.lower_limit_ml is not None and before.limits_half_width_ml is not None
    assert after.bias_ml.mean == pytest.approx(before.bias_ml.mean + shift, abs=1e-9)
    assert after.lower_limit_ml == pytest.approx(before.lower_limit_ml + shift, abs=1e-9)
    assert after.limits_half_width_ml == pytest.approx(before.limits_half_width_ml, abs=1e-9)
    differences = np.subtract(predicted, truth)
    if np.ptp(differences) > 1e-3:
        by_t = stats.ttest_1samp(differences, 0).confidence_interval()
        assert before.bias_ml.low == pytest.approx(by_t.low, abs=1e-9)
