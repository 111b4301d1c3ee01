"""Chance that an adversary cannot guess: noise and draws from a stream cipher.

Bytes come from ChaCha20. Every request takes a key of its own from the operating system and forgets
it: nothing is kept between requests that threads could share, that a forked process, a copy of the
object or a snapshot of the machine could use again, or that who reads the memory later could go
back from.

The caveat: Gaussian noise is computed in float64, and only approximates real numbers. Which values
it can and cannot take depends on the sum to which it is added, which leaks in principle (Mironov,
CCS 2012), and the sum's own rounding depends on its terms; no accountant knows of either. Nobody
has shown an attack on sums of millions of rounded float32 coordinates, but the guarantee is one of
real arithmetic. Integer noise on integer sums has no such gap: `discrete_gaussian` samples exactly
(Canonne, Kamath, Steinke, NeurIPS 2020), by integer comparisons alone. Its running time depends on
the values drawn.

A seeded source repeats, for science. Whoever knows the seed can take its noise away again: it says
`private = False`, and what was made with it must be marked "not private".
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from fractions import Fraction
from hashlib import sha256
from math import isfinite, isqrt, prod, tau
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

KEY = 32
CHUNK = 1 << 26  # bytes under one key; ChaCha20's counter ends at 2**38
BLOCK = 1 << 20  # numbers that are computed at once
MAX_INT = 1 << 62

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Noise:
    """A stream of chance; `private` is False where somebody could know it.

    Make one with `Noise.from_system()` or `Noise.seeded(...)`.
    """

    def __init__(self, key: bytes | None) -> None:
        self._key = key
        self.private = key is None

    @classmethod
    def from_system(cls) -> Noise:
        """Keyed by the operating system, anew for each request; never the same twice."""
        return cls(None)

    @classmethod
    def seeded(cls, seed: int, purpose: str) -> Noise:
        """The same stream for the same seed and purpose. Not private."""
        return cls(sha256(f"fedseg not private {seed} {purpose}".encode()).digest())

    def bytes(self, count: int) -> bytearray:
        """So many bytes of the stream."""
        found = bytearray()
        while len(found) < count:
            key = secrets.token_bytes(KEY) if self._key is None else self._key
            stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
            following = stream.update(bytes(KEY))
            found += stream.update(bytes(min(CHUNK, count - len(found))))
            if self._key is not None:
                self._key = following  # a seeded stream draws the key of its next request
        return found

    def gaussian(self, shape: tuple[int, ...], sigma: float) -> NDArray[np.float64]:
        """Normal noise of standard deviation sigma, rounded to float64; see the caveat above.

        Box and Muller's transform of 64-bit uniforms, so that its tail ends at 9.5 sigma.

        Raises:
            ValueError: sigma is negative or not finite.
        """
        if not isfinite(sigma) or sigma < 0:
            raise ValueError(f"expected a finite sigma of at least 0, came {sigma}")
        found = np.empty(prod(shape))
        for start in range(0, len(found), BLOCK):
            part = found[start : start + BLOCK]
            half = (len(part) + 1) // 2
            radius = np.sqrt(-2 * np.log((self._words(half) + 0.5) * 2.0**-64))
            angle = self._words(half) * (tau * 2.0**-64)
            part[:half] = radius * np.cos(angle)
            part[half:] = (radius * np.sin(angle))[: len(part) - half]
        found *= sigma
        return found.reshape(shape)

    def discrete_gaussian(self, count: int, variance: Fraction | int) -> Ints:
        """Integers x with probability proportional to exp(-x**2 / (2 * variance)), exactly.

        `variance` is the parameter; the distribution's own variance is at most it. Algorithm 3 of
        Canonne et al.: a discrete Laplace draw is kept with the right probability.

        Raises:
            ValueError: the variance is not positive, or so large that draws may leave 64 bits.
        """
        variance = Fraction(variance)
        if not 0 < variance < 1 << 100:
            raise ValueError("expected a variance above 0 and below 2**100")
        scale = isqrt(variance.numerator // variance.denominator) + 1
        n, d = variance.numerator, variance.denominator
        found: list[Ints] = []
        missing = count
        while missing > 0:
            drawn = self._discrete_laplace(2 * missing + 8, scale)
            # kept with exp(-(|y| - variance / scale)**2 / (2 * variance)), all over 2 n d scale**2
            bound = (int(np.abs(drawn).max()) * d * scale + n) ** 2
            wide: NDArray[Any] = drawn.astype(_dtype(max(bound, 2 * n * d * scale**2)))
            above = (np.abs(wide) * (d * scale) - n) ** 2
            kept = drawn[self._exponential(above, 2 * n * d * scale**2)][:missing]
            found.append(kept)
            missing -= len(kept)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def chosen(self, count: int, rate: float) -> Flags:
        """True with probability rate, each by itself: Poisson sampling of patients.

        The rate is rounded to a multiple of 2**-64; at 1 all are chosen.

        Raises:
            ValueError: the rate is not in 0..1.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"expected a rate in 0..1, came {rate}")
        limit = round(Fraction(rate) * (1 << 64))
        words = self._words(count)
        return np.ones(count, bool) if limit == 1 << 64 else words < np.uint64(limit)

    def _words(self, count: int) -> NDArray[np.uint64]:
        """Uniform 64-bit integers."""
        return np.frombuffer(self.bytes(8 * count), "<u8")

    def _below(self, count: int, limit: int) -> NDArray[np.int64]:
        """Uniform integers in 0..limit - 1, by rejection."""
        width = (limit - 1).bit_length()
        return self._retry(count, limit, lambda left: self._candidates(left, width))

    def _candidates(self, count: int, width: int) -> NDArray[np.int64]:
        """Uniform integers of so many bits."""
        if width < 63:
            return (self._words(count) & np.uint64((1 << width) - 1)).astype(np.int64)
        size = (width + 7) // 8
        data, mask = self.bytes(count * size), (1 << width) - 1
        wide = [int.from_bytes(data[i : i + size]) & mask for i in range(0, len(data), size)]
        return np.array(wide, dtype=object)

    def _retry(
        self, count: int, limit: int, draw: Callable[[int], NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """Draw until so many lie below the limit."""
        found: list[NDArray[np.int64]] = []
        missing = count
        while missing > 0:
            drawn = draw(missing + missing // 2 + 8)
            kept = drawn[drawn < limit][:missing]
            found.append(kept)
            missing -= len(kept)
        return np.concatenate(found) if found else draw(0)

    def _exponential(self, above: NDArray[np.int64], below: int) -> Flags:
        """True with probability exp(-above / below), exactly, above >= 0 (their Algorithm 1)."""
        whole, rest = above // below, above % below
        kept = self._exponential_of_at_most_one(rest, below)
        left = np.flatnonzero(kept & (whole > 0))
        turns = whole.astype(object) if whole.dtype == object else whole.copy()
        while len(left):
            again = self._exponential_of_at_most_one(np.ones(len(left), np.int64), 1)
            kept[left[~again]] = False
            turns[left] -= 1
            left = left[again & (turns[left] > 0)]
        return kept

    def _exponential_of_at_most_one(self, above: NDArray[np.int64], below: int) -> Flags:
        """True with probability exp(-above / below), for above <= below."""
        odd = np.ones(len(above), bool)  # the series' index k, which starts at 1
        left = np.arange(len(above))
        k = 1
        while len(left):
            left = left[self._below(len(left), below * k) < above[left]]
            odd[left] = ~odd[left]
            k += 1
        return odd

    def _discrete_laplace(self, count: int, scale: int) -> Ints:
        """Integers with probability proportional to exp(-|x| / scale) (their Algorithm 2)."""
        found: list[Ints] = []
        missing = count
        while missing > 0:
            rest = self._below(missing * 2 + 8, scale)
            rest = rest[self._exponential_of_at_most_one(rest, scale)]
            size = rest + scale * self._geometric(len(rest))
            negative = (self._words(len(rest)) & np.uint64(1)).astype(bool)
            drawn = np.where(negative, -size, size)[~(negative & (size == 0))][:missing]
            found.append(drawn)
            missing -= len(drawn)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _geometric(self, count: int) -> Ints:
        """How often an event of probability exp(-1) comes before it does not."""
        found = np.zeros(count, np.int64)
        left = np.arange(count)
        while len(left):
            left = left[self._exponential_of_at_most_one(np.ones(len(left), np.int64), 1)]
            found[left] += 1
        return found


def _dtype(largest: int) -> type:
    """int64 where it suffices, else python's integers."""
    return np.int64 if largest < MAX_INT else object
