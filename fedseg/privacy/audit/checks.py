"""Noise and sampling tested by themselves: a wrong one shows long before any patient is guessed.

Each test has a p-value: how probable so large a deviation is in an honest mechanism. Several
questions share one test by Bonferroni's rule. Where sums are not normal, p-values come from
simulations of the honest mechanism (Besag and Clifford, Biometrika 1989), so that they hold for the
smallest audit too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrc, chdtr, chdtrc, ndtr

from fedseg.privacy.audit.bounds import Flags, Floats
from fedseg.privacy.audit.canaries import Transcript

SIGNIFICANT = 0.001
SIMULATIONS = 19_999
ROUNDING = 0.01  # of weights in float32


@dataclass(frozen=True)
class Check:
    """One direct test.

    Attributes:
        what: was tested, in a few words.
        p: of the honest mechanism giving so much or more.
        expected: a figure that is easy to understand, as claimed.
        found: the same, as measured.
    """

    what: str
    p: float
    expected: float
    found: float

    @property
    def holds(self) -> bool:
        """Whether the mechanism may be honest; wrongly False once in a thousand."""
        return self.p >= SIGNIFICANT


def noise_check(seen: Transcript, noise_multiplier: float) -> Check:
    """Whether the noise of every tensor has the claimed variance and is fresh in each step.

    Chi-square over all coordinates in which nobody contributed and over those of each tensor, and
    the mean of products of following steps, which is 0 where noise is fresh.
    """
    quiet = seen.quiet / noise_multiplier
    tensors = seen.tensors[~seen.members]
    questions = _noise_questions(quiet)
    questions += [_variance(quiet[:, tensors == each]) for each in np.unique(tensors)]
    found = float(np.sqrt(np.mean(np.square(seen.quiet)))) if quiet.size else noise_multiplier
    return Check(
        "standard deviation of the noise over C", _least(questions), noise_multiplier, found
    )


def sampling_check(drawn: Flags, rate: float, seed: int) -> Check:
    """Whether each patient was drawn by itself: counts by step and by patient are binomial.

    Draws of a fixed size vary too little from step to step, shuffles too little from patient to
    patient; favourites vary too much.

    Args:
        drawn: (steps, patients), who was in each step.
        rate: the claimed probability.
        seed: of the simulations.

    Returns:
        A check whose figure is the variance of the step's size over the binomial one; where the
        rate is 1 the share of patients drawn.
    """
    steps, patients = drawn.shape
    if rate == 1:
        share = float(drawn.mean())
        return Check("share of patients in a full-batch step", float(share == 1), 1.0, share)
    rng = np.random.default_rng(seed)
    variance = rate * (1 - rate)
    by_step, by_patient = drawn.sum(1), drawn.sum(0)
    questions = [
        _count(int(drawn.sum()), drawn.size, rate),
        _dispersion(by_step, patients, rate, rng),
        _dispersion(by_patient, steps, rate, rng),
    ]
    if steps > 1:
        together = drawn[1:] & drawn[:-1]  # the same patient in two following steps
        questions.append(_repeats(int(together.sum()), steps, patients, rate, rng))
    ratio = float(np.mean(np.square(by_step - patients * rate)) / (patients * variance))
    return Check("variance of a step's size over the binomial one", _least(questions), 1.0, ratio)


def idle_check(noise: Floats, noise_multiplier: float) -> Check:
    """Whether the trainer's round adds fresh noise of the claimed variance where nobody is read."""
    what = "standard deviation of the noise of the trainer's own round, over C"
    found = float(np.sqrt(np.mean(np.square(noise))))
    questions = _noise_questions(noise / noise_multiplier)
    return Check(what, _least(questions), noise_multiplier, found)


def share_check(share: float) -> Check:
    """Whether one patient adds at most C; there is no chance in it."""
    what = "norm over C that one patient adds in the trainer's own round"
    return Check(what, float(share <= 1 + ROUNDING), 1.0, share)


def _noise_questions(values: Floats) -> list[float]:
    """P-values of standard normal noise (steps, numbers): its variance, and that it is fresh."""
    if not values.size:
        return [1.0]
    found = [_variance(values)]
    if len(values) > 1:
        products = values[1:] * values[:-1]
        found.append(2 * float(ndtr(-abs(products.sum()) / products.size**0.5)))
    return found


def _variance(values: Floats) -> float:
    """Two-sided p-value of independent standard normal values, by the sum of their squares."""
    total = float(np.square(values).sum())
    return _two_sided(float(chdtr(values.size, total)), float(chdtrc(values.size, total)))


def _count(found: int, trials: int, rate: float) -> float:
    """Two-sided p-value of a binomial count."""
    above = float(bdtrc(found - 1, trials, rate)) if found else 1.0
    return _two_sided(float(bdtr(found, trials, rate)), above)


def _dispersion(
    counts: NDArray[np.int64], trials: int, rate: float, rng: np.random.Generator
) -> float:
    """Two-sided p-value of the spread of independent binomial counts around their mean."""
    simulated = rng.binomial(trials, rate, (SIMULATIONS, len(counts)))
    spread = np.square(simulated - trials * rate).sum(1)
    return _simulated(float(np.square(counts - trials * rate).sum()), spread)


def _repeats(found: int, steps: int, patients: int, rate: float, rng: np.random.Generator) -> float:
    """Two-sided p-value of how often the same patient is in two following steps."""
    drawn = rng.random((SIMULATIONS, steps)) < rate
    one_patient = (drawn[:, 1:] & drawn[:, :-1]).sum(1)
    return _simulated(float(found), rng.choice(one_patient, (SIMULATIONS, patients)).sum(1))


def _simulated(found: float, honest: NDArray[np.float64] | NDArray[np.int64]) -> float:
    """Two-sided p-value among simulations."""
    below, above = int((honest <= found).sum()), int((honest >= found).sum())
    return _two_sided((1 + below) / (1 + len(honest)), (1 + above) / (1 + len(honest)))


def _two_sided(below: float, above: float) -> float:
    """From both tails."""
    return min(1.0, 2 * min(below, above))


def _least(questions: Sequence[float]) -> float:
    """The least of several p-values, times their number (Bonferroni)."""
    return min(1.0, len(questions) * min(questions))
