"""Means and shares over patients with 95 % intervals that few patients do not make too narrow.

A bootstrap interval of N patients is narrower than it should be by about the difference between a
normal and a t distribution, and by sqrt((N - 1) / N). Its level is raised by as much (the expanded
interval of Hesterberg, The American Statistician 2015). Below six patients there is none: no test
of so few can reach 5 %, and no interval is worth its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

from scipy import stats

from fedseg.evaluation.evidence import Estimate
from fedseg.evaluation.statistics import mean_with_interval

FEWEST = 6
LEVEL = 0.95


def estimate(values: Iterable[float | None], *, seed: int = 0) -> Estimate:
    """Mean over the patients who have a value.

    Args:
        values: one a patient; None where it is undefined.
        seed: equal values and seeds give equal intervals.

    Returns:
        The mean with its interval, expanded BCa; without interval below `FEWEST` values.

    Raises:
        ValueError: a value is not finite.
    """
    known = [value for value in values if value is not None]
    if not known:
        return Estimate(patients=0, mean=None, low=None, high=None)
    mean, low, high = mean_with_interval(known, seed=seed, level=expanded_level(len(known)))
    if len(known) < FEWEST:
        low = high = None
    return Estimate(patients=len(known), mean=mean, low=low, high=high)


def share(count: int, patients: int) -> Estimate:
    """A share of patients with its exact interval (Clopper and Pearson, Biometrika 1934)."""
    if not patients:
        return Estimate(patients=0, mean=None, low=None, high=None)
    test = stats.binomtest(count, patients)
    found = test.proportion_ci(LEVEL, method="exact")
    return Estimate(
        patients=patients, mean=count / patients, low=float(found.low), high=float(found.high)
    )


def expanded_level(patients: int, level: float = LEVEL) -> float:
    """The level at which a bootstrap interval of so many patients is as wide as one by t.

    Args:
        patients: at least one; of a single one, which has no interval, the level comes back.
        level: the coverage that is wanted.

    Returns:
        At least `level`, below 1; near `level` for many patients.
    """
    if patients < 2:
        return level
    quantile = stats.t.ppf((1 + level) / 2, patients - 1)
    expanded = stats.norm.cdf(quantile * sqrt(patients / (patients - 1)))
    return min(float(2 * expanded - 1), 1 - 1e-6)
