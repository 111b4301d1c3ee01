"""Means over patients with bootstrap intervals.

Patients are resampled, never cases, slices or labels. Intervals are bias-corrected and accelerated
(BCa; Efron, JASA 1987). Up to about ten patients they are too narrow, as all bootstraps are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 9_999

MeanWithInterval = tuple[float, float | None, float | None]


def mean_with_interval(
    values: Sequence[float], *, seed: int = 0, level: float = 0.95
) -> MeanWithInterval:
    """Mean over patients, and the lower and upper end of its interval.

    Args:
        values: one a patient, finite, at least one.
        seed: equal values and seeds give equal intervals.
        level: coverage of the interval.

    Returns:
        (mean, low, high); low and high are None for a single patient, and equal the mean where all
        values are the same.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError("a mean needs at least one value, and finite ones")
    mean = float(sample.mean())
    if sample.size == 1:
        return mean, None, None
    if np.ptp(sample) == 0:
        return mean, mean, mean
    low, high = _interval(sample, "BCa", seed, level)
    if not np.isfinite([low, high]).all():
        low, high = _interval(sample, "percentile", seed, level)
    return mean, low, high


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, level: float = 0.95
) -> MeanWithInterval:
    """Mean of a - b over the same patients, in the same order, with its interval.

    Raises:
        ValueError: different numbers of patients, none, or a value that is not finite.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs equal patients, not {len(a)} and {len(b)}")
    return mean_with_interval(np.subtract(a, b).tolist(), seed=seed, level=level)


def _interval(
    sample: NDArray[np.float64], method: str, seed: int, level: float
) -> tuple[float, float]:
    """Bootstrap interval of the mean."""
    found = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method=method,
        vectorized=True,
        axis=-1,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
