"""Lower bounds on epsilon: by hand, by other formulas, and by how often they are wrong."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
from scipy import stats

from fedseg.privacy.audit.bounds import llr, of_any, of_schedule, one_run_epsilon, one_run_p
from fedseg.privacy.mechanisms import Mechanism


def test_without_delta_the_p_value_is_a_binomial_tail() -> None:
    """Steinke et al.: 75 of 100 right under randomised response of epsilon log 3."""
    assert one_run_p(100, 100, 75, log(3), 0.0) == pytest.approx(0.553, abs=1e-3)
    assert one_run_p(100, 100, 75, log(3), 0.0) == pytest.approx(stats.binom.sf(74, 100, 0.75))
    assert one_run_p(10, 5, 0, 1.0, 0.0) == 1.0


def test_delta_adds_what_the_theorem_says() -> None:
    """Theorem 5.2 by its plain loop."""
    m, r, v, epsilon, delta = 500, 90, 70, 0.8, 1e-4
    q = 1 / (1 + np.exp(-epsilon))
    alpha = total = 0.0
    for i in range(1, v + 1):
        total += stats.binom.pmf(v - i, r, q)
        alpha = max(alpha, total / i)
    expected = stats.binom.sf(v - 1, r, q) + 2 * m * delta * alpha
    assert one_run_p(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


def test_the_one_run_ceiling_is_the_logarithm_of_the_canaries() -> None:
    """All of 200 right: accuracy above 0.05 ** (1 / 200), so epsilon 4.2; chance gives 0."""
    accuracy = 0.05 ** (1 / 200)
    exact = log(accuracy / (1 - accuracy))
    assert one_run_epsilon(200, 200, 200, 0.0, 0.95) == pytest.approx(exact, abs=1e-3)
    assert exact == pytest.approx(4.2, abs=0.01)
    assert one_run_epsilon(200, 200, 100, 0.0, 0.95) == 0.0
    assert one_run_epsilon(200, 200, 200, 1e-5, 0.95) < exact


def test_the_schedule_bound_is_clopper_pearson_on_the_total_variation() -> None:
    """One full-batch step: errors of Phi(-mu / 2), and epsilon from mu by Balle and Wang."""
    scores = np.array([1.0] * 500 + [-1.0] * 500)
    members = scores > 0
    members[:150] = False  # 150 wrong
    work = Mechanism(noise_multiplier=3.0)
    found = of_schedule(scores, members, work, 1e-5, 0.95)
    error = stats.beta.ppf(0.95, 151, 850)
    mu = -2 * stats.norm.ppf(error)
    assert found.right == 850
    assert found.epsilon == pytest.approx(_epsilon(mu, 1e-5), rel=2e-3)
    mu = -2 * stats.norm.ppf(1 - 0.05**0.001)
    assert found.ceiling == pytest.approx(_epsilon(mu, 1e-5), rel=2e-3)


def test_the_schedule_bound_is_zero_for_chance_and_capped_for_certainty() -> None:
    rng = np.random.default_rng(0)
    members = rng.random(1000) < 0.5
    work = Mechanism(noise_multiplier=2.0, rate=0.2, steps=5)
    assert of_schedule(rng.normal(size=1000), members, work, 1e-5, 0.95).epsilon < 0.5
    sure = of_schedule(np.where(members, 1.0, -1.0), members, work, 1e-5, 0.95)
    assert sure.epsilon == sure.ceiling <= 100.0


def test_a_pure_mechanism_is_not_refuted_by_the_bound_without_assumptions() -> None:
    """Randomised response of epsilon 1 is the worst case; at 95 % it is wrongly refuted rarely."""
    rng, above = np.random.default_rng(0), 0
    for _ in range(200):
        members = rng.random(500) < 0.5
        told = np.where(rng.random(500) < 1 / (1 + np.exp(-1.0)), members, ~members)
        scores = np.where(told, 1.0, -1.0) * (1 + 1e-3 * rng.random(500))
        above += of_any(scores, members, 1e-9, 0.95).epsilon > 1.0
    assert stats.binomtest(above, 200, 0.05, alternative="greater").pvalue > 0.01


def test_the_score_is_the_likelihood_ratio() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4000, 3)) * 2
    spread = 1.4826 * np.median(np.abs(values - np.median(values)))
    inside = 0.3 * stats.norm.pdf(values, 1, spread) + 0.7 * stats.norm.pdf(values, 0, spread)
    expected = np.log(inside / stats.norm.pdf(values, 0, spread)).sum(0)
    assert llr(values, 0.3) == pytest.approx(expected)
    assert llr(np.zeros((2, 5)), 1.0).max() < 0  # without noise nobody was there


def _epsilon(mu: float, delta: float) -> float:
    """The epsilon of one Gaussian mechanism at this delta, by bisection."""

    def loss(epsilon: float) -> float:
        return float(
            stats.norm.cdf(mu / 2 - epsilon / mu)
            - np.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        )

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) > delta else (low, middle)
    return low
