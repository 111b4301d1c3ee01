"""Means over patients with intervals."""

from __future__ import annotations

import numpy as np
import pytest

from fedseg.evaluation.statistics import mean_with_interval, paired_difference


def test_an_interval_is_near_the_normal_one_for_many_patients() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, 200)
    mean, low, high = mean_with_interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / 200**0.5
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.002)
    assert high == pytest.approx(mean + half, abs=0.002)


def test_equal_seeds_give_equal_intervals() -> None:
    values = [0.2, 0.9, 0.85, 0.7, 0.95]
    assert mean_with_interval(values, seed=3) == mean_with_interval(values, seed=3)
    assert mean_with_interval(values, seed=3) != mean_with_interval(values, seed=4)


def test_a_wider_level_is_wider() -> None:
    values = [0.2, 0.9, 0.85, 0.7, 0.95, 0.6]
    _, low, high = mean_with_interval(values)
    _, lower, higher = mean_with_interval(values, level=0.99)
    assert lower is not None and low is not None and high is not None and higher is not None
    assert lower < low < high < higher


def test_few_patients() -> None:
    assert mean_with_interval([0.5]) == (0.5, None, None)
    assert mean_with_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    mean, low, high = mean_with_interval([0.4, 0.6])
    assert (mean, low, high) == (0.5, pytest.approx(0.4), pytest.approx(0.6))


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("inf")]])
def test_values_that_have_no_mean_are_misuse(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_with_interval(values)


def test_paired_differences_see_what_means_hide() -> None:
    before = np.random.default_rng(0).uniform(0.2, 0.9, 30)
    after = before + 0.01
    after[0] += 0.01
    mean, low, high = paired_difference(after.tolist(), before.tolist())
    assert mean == pytest.approx(0.01 + 0.01 / 30)
    assert low is not None and high is not None and 0.0099 < low <= high < 0.02
    with pytest.raises(ValueError, match="equal patients"):
        paired_difference([1.0], [1.0, 2.0])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        _, low, high = mean_with_interval(rng.beta(8, 2, 40).tolist())
        assert low is not None and high is not None
        hits += low <= 0.8 <= high
    assert 0.90 <= hits / 200 <= 0.99
