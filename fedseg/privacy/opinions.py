"""Two other accountants, both Opacus': the second opinion (PRV) and the loose bound (RDP).

PRV (Gopi et al., NeurIPS 2021) composes the same losses by other numerics; its upper end is
reported, with its error set to a tenth of a percent of epsilon, since Opacus' default of 0.01 is a
tenth of an epsilon of 0.1. Opacus composes the removal of a patient alone; the addition is put
beside it here and the larger counts. RDP (Mironov et al. 2019, Balle et al. 2020 for the
conversion) is an upper bound that needs no grid, and it is what a filter can add up.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from math import exp, inf, isfinite, log, log1p
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opacus.accountants.analysis import prv as opacus_prv
from opacus.accountants.analysis import rdp as opacus_rdp
from scipy.special import ndtr

from fedseg.privacy.mechanisms import Mechanism, merged

ORDERS = (
    *(1 + n / 8 for n in range(1, 72)),
    *(float(n) for n in range(10, 65)),
    *(float(n) for n in (72, 80, 96, 112, 128, 160, 192, 224, 256)),
)
PRV_ERROR = 0.001  # of epsilon, on either side
_DELTA_ERROR = 1e-3  # of delta
_MAX_POINTS = 2**23


class _Added(opacus_prv.PoissonSubsampledGaussianPRV):
    """The loss where a patient is added: minus the loss of the other direction, without it."""

    def cdf(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        ratio = np.log((np.exp(-np.asarray(t)) + self.sample_rate - 1) / self.sample_rate)
        below = ndtr(-(self.noise_multiplier * ratio + 0.5 / self.noise_multiplier))
        found: NDArray[np.float64] = np.where(np.isnan(ratio), 1.0, below)
        return found


def prv_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> tuple[float, float]:
    """Between which epsilons the mechanisms' lies, by Opacus' PRV accountant.

    The two are 0.2 to 0.4 % of epsilon apart, and further where the grid would not fit into memory
    (an epsilon well below 0.1 over thousands of steps).
    """
    work = merged(mechanisms)
    if not work:
        return 0.0, 0.0
    guess = rdp_epsilon(work, delta)
    low, high = _prv(work, delta, PRV_ERROR * guess)
    if high > 0 and guess > 1.5 * high:  # RDP was loose: again with the error that was promised
        low, high = _prv(work, delta, PRV_ERROR * high)
    return max(low, 0.0), max(high, 0.0)


def rdp(mechanism: Mechanism, order: float) -> float:
    """Renyi divergence of one mechanism, all its steps, at one order; infinity where unknown."""
    return mechanism.steps * _rdp_step(mechanism.noise_multiplier, mechanism.rate, order)


def rdp_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Epsilon by RDP, from above: the best order of `ORDERS`."""
    if not mechanisms:
        return 0.0
    return max(
        0.0,
        min(
            sum(rdp(each, order) for each in mechanisms) + conversion(order, delta)
            for order in ORDERS
        ),
    )


def conversion(order: float, delta: float) -> float:
    """What is added to an RDP bound of this order for an epsilon (Balle et al. 2020, Th. 21)."""
    return log1p(-1 / order) - (log(delta) + log(order)) / (order - 1)


@lru_cache(maxsize=100_000)
def _rdp_step(noise_multiplier: float, rate: float, order: float) -> float:
    """Opacus' RDP of one step; an order at which its series fails is infinity, which is a bound."""
    try:
        steps = opacus_rdp.compute_rdp(
            q=rate, noise_multiplier=noise_multiplier, steps=1, orders=order
        )
    except (ValueError, OverflowError):
        return inf
    found = float(np.asarray(steps))
    return found if isfinite(found) and found >= 0 else inf


def _prv(work: Sequence[Mechanism], delta: float, error: float) -> tuple[float, float]:
    """Lower and upper end, the larger direction each."""
    ends = [
        _one_direction(work, delta, error, kind)
        for kind in (opacus_prv.PoissonSubsampledGaussianPRV, _Added)
    ]
    return max(low for low, _ in ends), max(high for _, high in ends)


def _one_direction(
    work: Sequence[Mechanism], delta: float, error: float, kind: Any
) -> tuple[float, float]:
    """What `opacus.accountants.PRVAccountant` does, for one direction."""
    delta_error = _DELTA_ERROR * delta
    losses = [kind(each.rate, each.noise_multiplier) for each in work]
    counts = [each.steps for each in work]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # log(0) at rate 1, and RDP orders at the end of the list
        reach = opacus_prv.compute_safe_domain_size(losses, counts, error, delta_error)
        per_error = np.sqrt(sum(counts) * log(12 / delta_error) / 2)
        error = max(error, float(2 * reach * per_error / _MAX_POINTS))
        mesh = error / per_error
        domain = opacus_prv.Domain.create_aligned(-reach, reach, mesh)
        cut = [
            opacus_prv.TruncatedPrivacyRandomVariable(each, domain.t_min, domain.t_max)
            for each in losses
        ]
        discrete = [opacus_prv.discretize(each, domain) for each in cut]
        whole = opacus_prv.compose_heterogeneous(discrete, counts)
        if whole.compute_delta_estimate(exp(-30)) <= delta:
            return 0.0, 0.0
        low, _, high = whole.compute_epsilon(delta, delta_error, error)
    return float(low), float(high)
