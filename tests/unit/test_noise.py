"""Noise: what it is distributed as, that streams are their own, and that a seed is told."""

from __future__ import annotations

import copy
import os
import sys
import threading
from fractions import Fraction
from math import exp

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedseg.privacy.noise import Noise


def seeded(purpose: str) -> Noise:
    return Noise.seeded(7, purpose)


def test_gaussian_noise_has_the_normal_moments() -> None:
    x = seeded("moments").gaussian((1000, 1001), 3.0) / 3.0
    n = x.size
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(stats.skew(x, axis=None)) < 4 * (6 / n) ** 0.5
    assert abs(stats.kurtosis(x, axis=None)) < 4 * (24 / n) ** 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 100_001])
def test_gaussian_noise_passes_kolmogorov_and_smirnov(count: int) -> None:
    x = np.concatenate(
        [seeded(f"ks {i}").gaussian((count,), 1.0) for i in range(max(1, 3000 // count))]
    )
    assert stats.kstest(x, "norm").pvalue > 1e-3


def test_neighbouring_numbers_are_not_correlated() -> None:
    x = seeded("lags").gaussian((200_000,), 1.0)
    for lag in (1, 2, 100_000 - 1, 100_000):  # the two halves share a radius and an angle
        a, b = x[:-lag], x[lag:]
        for one, other in ((a, b), (a * a - 1, b * b - 1)):
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / len(a) ** 0.5


def test_streams_of_the_system_are_independent_and_private() -> None:
    one, other = Noise.from_system(), Noise.from_system()
    assert one.private and other.private
    a, b = one.gaussian((100_000,), 1.0), other.gaussian((100_000,), 1.0)
    assert not np.isin(a, b).any()
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 100_000**0.5
    assert not np.isin(a, one.gaussian((100_000,), 1.0)).any()


def test_a_seed_repeats_for_its_purpose_alone_and_is_not_private() -> None:
    assert not seeded("a").private
    assert seeded("a").bytes(100) == seeded("a").bytes(100)
    assert seeded("a").bytes(100) != seeded("b").bytes(100)
    assert seeded("a").bytes(100) != Noise.seeded(8, "a").bytes(100)


def test_nothing_is_kept_between_requests() -> None:
    """No copy, thread, forked process or snapshot can draw again what was drawn."""
    noise = Noise.from_system()
    twin = copy.deepcopy(noise)
    before = dict(vars(noise))
    assert noise.bytes(64) != twin.bytes(64) != noise.bytes(64)
    assert vars(noise) == before == {"_key": None, "private": True}
    repeats = seeded("a")
    assert repeats.bytes(64) != repeats.bytes(64)


def test_two_threads_never_draw_the_same() -> None:
    noise, drawn = Noise.from_system(), []

    def draw() -> None:
        drawn.extend(bytes(noise.bytes(16)) for _ in range(1000))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=draw) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(set(drawn)) == len(drawn) == 4000


def test_a_forked_process_draws_noise_of_its_own() -> None:
    noise = Noise.from_system()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, noise.bytes(32))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 32) != bytes(noise.bytes(32))
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    "variance", [Fraction(1, 5), Fraction(1), Fraction(22, 7), 50, Fraction((1 << 80) + 1, 1 << 77)]
)
def test_integer_noise_follows_the_exact_distribution(variance: Fraction | int) -> None:
    x = seeded(f"integers {variance}").discrete_gaussian(100_000, variance)
    assert x.dtype == np.int64
    check_pmf(x, float(variance))


def test_integer_noise_of_large_scale_is_normal() -> None:
    for bits in (20, 90):  # with 64-bit arithmetic, and with python's integers
        x = seeded(f"large {bits}").discrete_gaussian(20_000, 1 << bits)
        assert stats.kstest(x / 2.0 ** (bits / 2), "norm").pvalue > 1e-3


def test_integer_noise_is_counted_exactly() -> None:
    for count in (0, 1, 17):
        assert seeded("count").discrete_gaussian(count, 4).shape == (count,)


@pytest.mark.parametrize("rate", [0.0, 0.013, 0.5, 1.0])
def test_patients_are_chosen_at_the_rate_and_each_by_itself(rate: float) -> None:
    noise = seeded("poisson")
    chosen = np.array([noise.chosen(200, rate) for _ in range(2000)])
    total = int(chosen.sum())
    assert stats.binomtest(total, chosen.size, rate).pvalue > 1e-3
    if 0 < rate < 1:  # the number that is chosen varies as a binomial
        spread = chosen.sum(1).var(ddof=1) / (200 * rate * (1 - rate))
        assert abs(spread - 1) < 5 * (2 / 2000) ** 0.5


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf")])
def test_a_sigma_that_is_none_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma"):
        seeded("").gaussian((1,), sigma)


@pytest.mark.parametrize("variance", [0, -1, Fraction(-1, 2), 1 << 100])
def test_a_variance_that_is_none_is_refused(variance: Fraction | int) -> None:
    with pytest.raises(ValueError, match="variance"):
        seeded("").discrete_gaussian(1, variance)


def check_pmf(x: NDArray[np.int64], variance: float) -> None:
    """A chi-square test against exp(-x**2 / (2 * variance)), its rare ends put together."""
    reach = int(12 * variance**0.5) + 2
    weights = {k: exp(-k * k / (2 * variance)) for k in range(-reach, reach + 1)}
    total = sum(weights.values())
    common = [k for k, w in weights.items() if len(x) * w / total > 20]
    counts = [int((x == k).sum()) for k in common]
    expected = [len(x) * weights[k] / total for k in common]
    counts.append(len(x) - sum(counts))
    expected.append(len(x) - sum(expected))
    if expected[-1] < 1:
        assert counts[-1] <= 5
        counts, expected = counts[:-1], expected[:-1]
        expected = [e * sum(counts) / sum(expected) for e in expected]
    assert stats.chisquare(counts, expected).pvalue > 1e-3
