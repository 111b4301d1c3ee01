"""Means and shares of few patients."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedseg.evaluation.estimates import FEWEST, estimate, expanded_level, share

SCORES = st.lists(st.floats(0, 1), min_size=FEWEST, max_size=20)


def test_below_six_patients_there_is_a_mean_and_no_interval() -> None:
    found = estimate([0.2, None, 0.4, 0.6, 0.5, 0.3])
    assert (found.patients, found.low, found.high) == (5, None, None)
    assert found.mean == pytest.approx(0.4)
    assert estimate([None]).mean is None and estimate([]).patients == 0


def test_an_interval_of_normal_values_is_as_wide_as_one_by_t() -> None:
    values = stats.norm.ppf((np.arange(8) + 0.5) / 8)
    found = estimate(values.tolist())
    low, high = stats.t.interval(0.95, 7, 0, stats.sem(values))
    assert found.low is not None and found.high is not None
    assert found.low == pytest.approx(low, rel=0.15)
    assert found.high == pytest.approx(high, rel=0.15)


def test_intervals_of_six_patients_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = estimate(rng.normal(0.01, 0.02, FEWEST).tolist())
        assert found.low is not None and found.high is not None
        hits += found.low <= 0.01 <= found.high
    assert 0.90 <= hits / 200 <= 1.0


@settings(max_examples=25, deadline=None)
@given(SCORES)
def test_a_mean_lies_in_its_interval_whatever_the_values(values: list[float]) -> None:
    found = estimate(values)
    assert found.mean is not None and found.low is not None and found.high is not None
    assert min(values) - 1e-9 <= found.low <= found.mean + 1e-9
    assert found.mean - 1e-9 <= found.high <= max(values) + 1e-9
    assert estimate(values) == found


def test_the_level_is_raised_for_few_and_hardly_for_many() -> None:
    assert expanded_level(1) == 0.95
    assert expanded_level(10) == pytest.approx(
        2 * stats.norm.cdf(2.262157 * np.sqrt(10 / 9)) - 1, abs=1e-6
    )
    levels = [expanded_level(n) for n in range(2, 200)]
    assert levels == sorted(levels, reverse=True) and 0.95 < levels[-1] < 0.952


def test_a_share_has_its_exact_interval() -> None:
    found = share(0, 20)
    assert found.mean == 0 and found.low == 0
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 20))
    two = share(2, 20)
    assert two.low == pytest.approx(stats.beta.ppf(0.025, 2, 19))
    assert two.high == pytest.approx(stats.beta.ppf(0.975, 3, 18))
    assert share(0, 0).mean is None


def test_the_published_table_is_what_its_script_prints() -> None:
    """The columns that are not drawn by chance exactly, the widths of a few trials nearly."""
    page = (Path(__file__).parents[2] / "docs" / "validation.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \|.* \| (\d+)% \|$", page, re.MULTILINE)
    assert [int(n) for n, _, _ in rows] == [6, 8, 10, 15, 20, 30, 50, 100]
    for n, _, failing in rows:
        assert share(0, int(n)).high == pytest.approx(int(failing) / 100, abs=0.006)
    rng, (n, width, _) = np.random.default_rng(1), rows[4]
    found = [estimate(rng.normal(0, 2, int(n)).tolist()) for _ in range(40)]
    halves = [(each.high - each.low) / 2 for each in found if each.high and each.low]
    assert np.mean(halves) == pytest.approx(float(width), rel=0.1)
