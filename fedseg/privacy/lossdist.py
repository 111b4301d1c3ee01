"""Privacy loss distributions (PLD): the tight accountant, always from above.

The loss of a sampled Gaussian is put on a grid by splitting the mass between two neighbouring
points so that both its probability with the patient and without are kept ("connect the dots",
Doroshenko et al., PoPETs 2022): merging the two undoes it, so the grid's mechanism reveals no less
than the real one. Copies are composed by FFT inside a window; what Chernoff's bound leaves outside
is counted as lost. Both directions (a patient removed, a patient added) are composed and the larger
epsilon counts, since neither is proved to dominate under composition (Lebeda et al. 2024).

Floating point: masses are exact to about 1e-11 in all, so delta below 1e-9 is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, rfft
from scipy.special import logsumexp, ndtr, ndtri

from fedseg.errors import PrivacyError
from fedseg.privacy.mechanisms import Mechanism

Array = NDArray[np.float64]
SMALLEST_DELTA = 1e-9
_TAIL = 1e-15  # of one mechanism, and of the composed window on either side
_FINENESS = 0.02  # a grid step over the spread of one mechanism's loss
_MAX_POINTS = 2**24
_BLOCKS = 4096
_LARGEST_LOSS = 300.0  # beyond it a loss counts as complete
_RATES = np.concatenate([-np.geomspace(1e-2, 1e5, 71)[::-1], np.geomspace(1e-2, 1e5, 71)])


@dataclass(frozen=True)
class Losses:
    """Losses on a grid: mass `mass[i]` at `(first + i) * step`, `lost` at infinity."""

    mass: Array
    first: int
    step: float
    lost: float

    @property
    def values(self) -> Array:
        """The losses that the masses stand at."""
        return np.arange(self.first, self.first + len(self.mass), dtype=np.float64) * self.step

    def delta(self, epsilon: float) -> float:
        """The delta at one epsilon."""
        above = self.values > epsilon
        gap = -np.expm1(epsilon - self.values[above])
        return float(self.lost + np.sum(self.mass[above] * gap))

    def epsilon(self, delta: float) -> float:
        """The least epsilon, at least 0, whose delta is at most this; infinity where none is."""
        if self.delta(0.0) <= delta:
            return 0.0
        values = self.values
        lost = self.lost + float(np.sum(self.mass[values > _LARGEST_LOSS]))
        if lost > delta:
            return float("inf")
        counted = (values > 0) & (values <= _LARGEST_LOSS)
        value, mass = values[counted], self.mass[counted]
        above = np.cumsum(mass[::-1])[::-1] + lost
        scaled = np.cumsum((mass * np.exp(-value))[::-1])[::-1]
        at_point = above - np.exp(value) * scaled  # delta at each grid point, falling
        index = int(np.searchsorted(-at_point, -delta))
        return float(np.log((above[index] - delta) / scaled[index]))


def epsilon_of(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """The epsilon of all mechanisms together, from above.

    Args:
        mechanisms: what was done, in any order.
        delta: at least 1e-9.

    Raises:
        PrivacyError: delta is too small, or the mechanisms need a finer grid than memory allows.
    """
    if not SMALLEST_DELTA <= delta < 1:
        raise PrivacyError(f"delta must be in [{SMALLEST_DELTA}, 1), not {delta}")
    return max((losses.epsilon(delta) for losses in composed(mechanisms)), default=0.0)


def composed(mechanisms: Sequence[Mechanism]) -> tuple[Losses, ...]:
    """The losses of all mechanisms together, a patient removed and added; none for nothing."""
    if not mechanisms:
        return ()
    step = _grid_step(mechanisms)
    pairs = [_one(each, step) for each in mechanisms]
    counts = [each.steps for each in mechanisms]
    return tuple(_compose([pair[side] for pair in pairs], counts) for side in (0, 1))


def _loss(x: Array, mechanism: Mechanism) -> Array:
    """The loss at an outcome, log of (with the patient) over (without)."""
    exponent = (2 * x - 1) / (2 * mechanism.noise_multiplier**2)
    if mechanism.rate == 1:
        return exponent
    small = np.log1p(mechanism.rate * np.expm1(np.minimum(exponent, 30.0)))
    large = exponent + np.log(mechanism.rate + (1 - mechanism.rate) * np.exp(-exponent.clip(min=0)))
    return np.where(exponent < 30.0, small, large)


def _outcome(loss: Array, mechanism: Mechanism) -> Array:
    """The outcome at a loss; minus infinity below the least loss."""
    variance = mechanism.noise_multiplier**2
    if mechanism.rate == 1:
        return variance * loss + 0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.log1p(np.expm1(loss) / mechanism.rate)
    return np.where(np.isnan(ratio), -np.inf, variance * ratio + 0.5)


def _grid_step(mechanisms: Sequence[Mechanism]) -> float:
    """A grid step well below the spread of a step's loss."""
    variance = 0.0
    normal = np.linspace(-8, 8, 4001)
    weight = np.exp(-(normal**2) / 2)
    weight /= weight.sum()
    for each in mechanisms:
        sigma, q = each.noise_multiplier, each.rate
        without, present = _loss(sigma * normal, each), _loss(1 + sigma * normal, each)
        mean = weight @ ((1 - q) * without + q * present)
        spread = weight @ ((1 - q) * (without - mean) ** 2 + q * (present - mean) ** 2)
        variance += each.steps * float(spread)
    return float(_FINENESS * np.sqrt(variance / sum(each.steps for each in mechanisms)))


def _one(mechanism: Mechanism, step: float) -> tuple[Losses, Losses]:
    """One mechanism's losses on the grid: a patient removed, a patient added."""
    sigma, q = mechanism.noise_multiplier, mechanism.rate
    reach = -sigma * float(ndtri(_TAIL))
    ends = _loss(np.array([-reach, 1 + reach]), mechanism)
    first, last = int(np.floor(ends[0] / step)), int(np.ceil(ends[1] / step))
    grid = np.arange(first, last + 1, dtype=np.float64) * step
    edges = _outcome(grid, mechanism)
    without = _normal_mass(edges / sigma)
    present = (1 - q) * without + q * _normal_mass((edges - 1) / sigma)
    removed = _split(present[1:-1], without[1:-1], grid)
    added = _split(without[-2:0:-1], present[-2:0:-1], -grid[::-1])
    removed[0] += present[0]  # losses below the grid are rounded up onto it
    added[0] += without[-1]
    return (
        Losses(removed, first, step, float(present[-1])),
        Losses(added, -last, step, float(without[0])),
    )


def _normal_mass(edges: Array) -> Array:
    """Mass of the standard normal below, between and above edges, exact in both tails."""
    full = np.concatenate([[-np.inf], edges, [np.inf]])
    left, right = full[:-1], full[1:]
    masses: Array = np.where(left > 0, ndtr(-left) - ndtr(-right), ndtr(right) - ndtr(left))
    return masses


def _split(mass: Array, other: Array, grid: Array) -> Array:
    """Move the mass of each interval to its ends so that both masses are kept."""
    step = grid[1] - grid[0]
    upper = (mass - np.exp(grid[:-1]) * other) / -np.expm1(-step)
    upper = np.clip(upper, 0.0, mass)
    found = np.zeros(len(grid))
    found[1:] += upper
    found[:-1] += mass - upper
    return found


def _compose(parts: Sequence[Losses], counts: Sequence[int]) -> Losses:
    """Independent copies of each part, together."""
    step = parts[0].step
    first, last, outside = _window(parts, counts)
    size = 2 << (last - first).bit_length()
    if size > _MAX_POINTS:
        raise PrivacyError(
            "these mechanisms differ too much to be accounted for together on one grid"
        )
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    for part, count in zip(parts, counts, strict=True):
        places = (part.first + np.arange(len(part.mass))) % size
        spectrum *= rfft(np.bincount(places, part.mass, minlength=size)) ** count
    mass = np.roll(irfft(spectrum, size), -(first % size))
    kept = sum(n * np.log1p(-part.lost) for part, n in zip(parts, counts, strict=True))
    lost = float(-np.expm1(kept)) + outside
    return Losses(np.maximum(mass, 0.0), first, step, lost)


def _window(parts: Sequence[Losses], counts: Sequence[int]) -> tuple[int, int, float]:
    """Between which grid points all but a sliver of the composed mass lies (Chernoff)."""
    log_moments = np.zeros(len(_RATES))
    for part, count in zip(parts, counts, strict=True):
        log_moments += count * _log_moments(part)
    bounds = (log_moments - np.log(_TAIL)) / _RATES
    low, high = float(np.max(bounds[_RATES < 0])), float(np.min(bounds[_RATES > 0]))
    lowest = sum(part.first * n for part, n in zip(parts, counts, strict=True))
    highest = sum(
        (part.first + len(part.mass) - 1) * n for part, n in zip(parts, counts, strict=True)
    )
    step = parts[0].step
    first = max(int(np.floor(low / step)), lowest)
    last = min(int(np.ceil(high / step)), highest)
    return first, last, 2 * _TAIL


def _log_moments(part: Losses) -> Array:
    """Log of E exp(rate * loss), from above, for each of `_RATES`; in blocks, which is quick."""
    width = -(-len(part.mass) // _BLOCKS)
    starts = np.arange(0, len(part.mass), width)
    mass = np.add.reduceat(part.mass, starts)
    low = part.values[starts][mass > 0]
    high, mass = low + (width - 1) * part.step, mass[mass > 0]
    return np.array([logsumexp(r * (high if r > 0 else low), b=mass) for r in _RATES])
