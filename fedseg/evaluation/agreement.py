"""How well predicted volumes agree with true ones (Bland and Altman, Lancet 1986).

The mean difference is the bias; about 95 % of patients lie between the limits of agreement, were
the differences normal. Bias and limits have intervals of their own (Bland and Altman, Statistical
Methods in Medical Research 1999), because both are only known as well as the patients are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedseg.evaluation.estimates import FEWEST, LEVEL
from fedseg.evaluation.evidence import Agreement, Estimate

LIMIT = 1.96


def volume_agreement(
    candidate: str, label: str, truth_ml: Sequence[float], predicted_ml: Sequence[float]
) -> Agreement:
    """Bias and limits of agreement of one label's volume.

    Args:
        truth_ml: one a patient.
        predicted_ml: of the same patients in the same order.

    Returns:
        Predicted less true. Without intervals and limits below six patients. `bias_percent` takes
        the mean true volume as known.

    Raises:
        ValueError: different numbers of patients.
    """
    truth, predicted = np.asarray(truth_ml, np.float64), np.asarray(predicted_ml, np.float64)
    if truth.shape != predicted.shape:
        raise ValueError(f"{truth.size} true volumes cannot be held against {predicted.size}")
    difference = predicted - truth
    bias = _mean_by_t(difference)
    whole = float(truth.mean()) if truth.size else 0.0
    spread = float(difference.std(ddof=1)) if truth.size >= FEWEST else None
    limits = None if spread is None or bias.mean is None else LIMIT * spread
    return Agreement(
        candidate=candidate,
        label=label,
        patients=int(truth.size),
        bias_ml=bias,
        bias_percent=_scaled(bias, 100 / whole) if whole > 0 else _nothing(0),
        lower_limit_ml=None if limits is None else float(difference.mean()) - limits,
        upper_limit_ml=None if limits is None else float(difference.mean()) + limits,
        limits_half_width_ml=None if spread is None else _limits_half_width(spread, truth.size),
        slope=_slope((truth + predicted) / 2, difference),
    )


def _mean_by_t(values: NDArray[np.float64]) -> Estimate:
    """Mean with its t interval."""
    n = int(values.size)
    if not n:
        return _nothing(0)
    mean = float(values.mean())
    if n < FEWEST:
        return Estimate(patients=n, mean=mean, low=None, high=None)
    half = _quantile(n - 1) * float(values.std(ddof=1)) / sqrt(n)
    return Estimate(patients=n, mean=mean, low=mean - half, high=mean + half)


def _limits_half_width(spread: float, patients: int) -> float:
    """Of the interval of either limit, whose variance is s² (1 / n + 1.96² / (2 (n - 1)))."""
    variance = 1 / patients + LIMIT**2 / (2 * (patients - 1))
    return _quantile(patients - 1) * spread * sqrt(variance)


def _slope(size: NDArray[np.float64], difference: NDArray[np.float64]) -> Estimate:
    """Least squares of the difference on the size, with its t interval."""
    n = int(size.size)
    if n < FEWEST or np.ptp(size) == 0:
        return _nothing(n)
    found = stats.linregress(size, difference)
    slope, half = float(found.slope), _quantile(n - 2) * float(found.stderr)
    return Estimate(patients=n, mean=slope, low=slope - half, high=slope + half)


def _quantile(freedom: int) -> float:
    """Of t, two-sided."""
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    """All of an estimate times a positive factor."""
    mean, low, high = (
        None if value is None else value * factor
        for value in (estimate.mean, estimate.low, estimate.high)
    )
    return Estimate(patients=estimate.patients, mean=mean, low=low, high=high)


def _nothing(patients: int) -> Estimate:
    """Where nothing can be told."""
    return Estimate(patients=patients, mean=None, low=None, high=None)
