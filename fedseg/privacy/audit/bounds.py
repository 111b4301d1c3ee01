"""From guesses about who took part to a lower bound on epsilon, with its confidence and ceiling.

Each canary takes part or not by a fair coin, and the adversary guesses which. Two bounds:

- `of_schedule` tests the claim that the ledger composes: the schedule's whole privacy profile. Any
  rule that guesses from the transcript alone errs on a canary with probability at least
  (1 - delta(0)) / 2, where delta(0) is the profile at epsilon 0, the total variation between the
  two worlds. Canaries in orthogonal coordinates under independent noise are independent trials, so
  that their errors are at least binomial, and Clopper and Pearson's upper end of the error rate is
  exact. The bound is the epsilon, at the plan's delta, of the same schedule with so much less noise
  that this many errors are plausible.
- `of_any` assumes nothing but (epsilon, delta)-privacy: neither Gaussian noise nor independence
  (Steinke, Nasr, Jagielski, NeurIPS 2023, Theorem 5.2). It guesses where the transcript is clearest
  and abstains elsewhere. It is looser: at epsilon near 1 it needs ten times the canaries.

A bound that was never reachable tells nothing, so each comes with its ceiling: what it would be if
every guess were right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import exp, log

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, betaincinv, gammaln, ndtr, xlog1py, xlogy

from fedseg.errors import PrivacyError
from fedseg.privacy.accounting import epsilon_spent
from fedseg.privacy.lossdist import composed
from fedseg.privacy.mechanisms import Mechanism

LARGEST = 100.0  # beyond it a bound is not told apart
_LEAST_NOISE, _MOST_NOISE = 0.05, 1e6
_PRECISION = 1e-4
_SHARES = (1.0, 0.25, 0.0625)  # of canaries that `of_any` guesses about

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon at the plan's delta.

    Attributes:
        epsilon: at least this, unless the audit was unlucky; 0 where nothing was found; at most
            100, which means "100 or more".
        ceiling: the bound that this audit gives if every guess is right.
        confidence: one minus the probability, over audits of an honest mechanism, that the bound
            is above its true epsilon.
        guesses: how many were made.
        right: how many of them were.
    """

    epsilon: float
    ceiling: float
    confidence: float
    guesses: int
    right: int


def of_schedule(
    scores: Floats, members: Flags, work: Mechanism, delta: float, confidence: float
) -> Bound:
    """The least epsilon that this schedule can have, given how often guesses are right.

    Args:
        scores: (canaries,), from the transcript alone; above 0 is a guess that it took part.
        members: (canaries,), who did, by fair coins.
        work: the schedule; its noise is what is looked for.
        delta: of the plan.
        confidence: such as 0.95.
    """
    count = len(scores)
    right = int(((scores > 0) == members).sum())
    found, ceiling = (
        _with_error(_upper(wrong, count, confidence), work, delta) for wrong in (count - right, 0)
    )
    return Bound(found, ceiling, confidence, count, right)


def of_any(scores: Floats, members: Flags, delta: float, confidence: float) -> Bound:
    """The least epsilon that any mechanism with this delta can have (Steinke et al. 2023).

    The clearest quarter and sixteenth of the canaries are tried beside all of them; the chance to
    err is divided among the three.

    Args:
        scores: as in `of_schedule`; the larger, the rather.
        members: (canaries,), who did, by fair coins.
        delta: of the plan.
        confidence: such as 0.95.
    """
    count, order = len(scores), np.argsort(scores, kind="stable")
    each = 1 - (1 - confidence) / len(_SHARES)
    tried = []
    for share in _SHARES:
        half = int(share * count / 2)
        low, high = (order[:half], order[count - half :]) if share < 1 else _signs(scores)
        right, guesses = int(members[high].sum() + (~members[low]).sum()), len(low) + len(high)
        tried.append((one_run_epsilon(count, guesses, right, delta, each), guesses, right))
    epsilon, guesses, right = max(tried)
    ceiling = one_run_epsilon(count, count, count, delta, each)
    return Bound(epsilon, ceiling, confidence, guesses, right)


def one_run_epsilon(
    canaries: int, guesses: int, right: int, delta: float, confidence: float
) -> float:
    """The largest epsilon, at most 100, that so many right guesses refute; 0 for none."""
    low, high = 0.0, LARGEST
    if one_run_p(canaries, guesses, right, low, delta) > 1 - confidence:
        return 0.0
    while high - low > _PRECISION:
        middle = (low + high) / 2
        refuted = one_run_p(canaries, guesses, right, middle, delta) <= 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def one_run_p(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How probable so many right guesses are at most, under (epsilon, delta)-privacy.

    Raises:
        ValueError: more right guesses than guesses, or more guesses than canaries.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"expected right <= guesses <= canaries: {right}, {guesses}, {canaries}")
    accuracy = 1 / (1 + exp(-epsilon))
    tail = float(bdtrc(right - 1, guesses, accuracy)) if right else 1.0
    if delta == 0 or right == 0:
        return min(1.0, tail)
    below = _binomial(np.arange(right - 1, -1, -1), guesses, accuracy).cumsum()
    steepest = float((below / np.arange(1, right + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * steepest)


def llr(values: Floats, rate: float) -> Floats:
    """Log likelihood ratio of "took part" for each canary: the best score for Gaussian noise.

    The noise is estimated from the values themselves (their median deviation), so that the rule
    fits the noise that was really added, and not the one that was claimed.

    Args:
        values: (steps, canaries), what was released in each canary's coordinate, over C.
        rate: with which those who took part were drawn.
    """
    spread = 1.4826 * float(np.median(np.abs(values - np.median(values))))
    exponent = (2 * values - 1) / (2 * max(spread, 1e-3) ** 2)
    if rate == 1:
        return np.asarray(exponent.sum(0))
    return np.asarray(np.logaddexp(np.log1p(-rate), log(rate) + exponent).sum(0))


def _signs(scores: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Everybody, by the sign of the score: who is said not to have taken part, and who is."""
    return np.flatnonzero(scores <= 0), np.flatnonzero(scores > 0)


def _upper(hits: int, trials: int, confidence: float) -> float:
    """Clopper and Pearson's one-sided upper end of a probability (Biometrika 1934)."""
    if hits >= trials:
        return 1.0
    return float(betaincinv(hits + 1, trials - hits, confidence))


def _binomial(counts: NDArray[np.int64], trials: int, share: float) -> Floats:
    """The probability of each count."""
    ways = gammaln(trials + 1) - gammaln(counts + 1) - gammaln(trials - counts + 1)
    return np.asarray(np.exp(ways + xlogy(counts, share) + xlog1py(trials - counts, -share)))


@lru_cache(maxsize=1024)
def _with_error(error: float, work: Mechanism, delta: float) -> float:
    """The epsilon of the schedule with the most noise at which guesses can err so rarely."""
    variation = 1 - 2 * error
    if variation <= _variation(work, _MOST_NOISE):
        return 0.0
    low, high = _LEAST_NOISE, _MOST_NOISE
    while high > low * (1 + _PRECISION):
        middle = float((low * high) ** 0.5)
        low, high = (middle, high) if _variation(work, middle) >= variation else (low, middle)
    try:
        return min(LARGEST, epsilon_spent([_with(work, high)], delta))
    except PrivacyError:  # too little noise to account for
        return LARGEST


@lru_cache(maxsize=4096)
def _variation(work: Mechanism, noise: float) -> float:
    """Total variation between a transcript with a patient and without, from above."""
    if work.rate == 1:
        return 1 - 2 * float(ndtr(-0.5 * work.steps**0.5 / noise))
    try:
        return max(losses.delta(0.0) for losses in composed([_with(work, noise)]))
    except PrivacyError:
        return 1.0


def _with(work: Mechanism, noise: float) -> Mechanism:
    """The schedule with other noise."""
    return work.model_copy(update={"noise_multiplier": noise})
