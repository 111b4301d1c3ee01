"""An exact sum of updates: whatever the order of the answers, the same bits.

Floating-point addition depends on order. Here every value is rounded once to a multiple of
2**-SCALE_BITS, multiplied by its whole-number weight and added in int64, where addition is exact
and commutes. The sum is divided once, at the close. What cannot be held exactly is refused: no
value may reach MAX_VALUE and no total weight MAX_WEIGHT, so that nothing can overflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.arrays import Arrays
from fedseg.errors import RoundError
from fedseg.schema import TensorSpec

SCALE_BITS = 36
MAX_VALUE = 2.0**9
MAX_WEIGHT = 2**17
_SCALE = 2.0**SCALE_BITS
_CHUNK = 1 << 16


class MeanAccumulator:
    """Weighted mean of updates, folded one at a time; holds one int64 array a tensor.

    The rounding error of the mean is at most 2**-(SCALE_BITS + 1), about 7e-12, in each coordinate.
    """

    def __init__(self, schema: tuple[TensorSpec, ...]) -> None:
        self._sums = {spec.name: np.zeros(spec.shape, np.int64) for spec in schema}
        self.weight = 0
        self.count = 0

    def fold(self, update: Arrays, weight: int) -> None:
        """Add one update; either all of it counts or nothing.

        Args:
            update: finite arrays with the names and shapes of the schema.
            weight: a whole number of at least 1, for example the site's training patients.

        Raises:
            RoundError: a value or the total weight is too large to be summed exactly.
            ValueError: other names or shapes than the schema's.
        """
        if update.keys() != self._sums.keys():
            raise ValueError("the update's names are not the schema's")
        if weight < 1 or self.weight + weight > MAX_WEIGHT:
            raise RoundError(
                f"weights must be at least 1 and below {MAX_WEIGHT} in all; "
                f"{weight} came on top of {self.weight}"
            )
        for name, array in update.items():
            if array.shape != self._sums[name].shape:
                raise ValueError(f"{name} has shape {array.shape}, not {self._sums[name].shape}")
            if array.size and not max(float(np.max(array)), -float(np.min(array))) < MAX_VALUE:
                raise RoundError(
                    f"tensor {name!r} of an update reaches beyond +-{MAX_VALUE:g}: training has "
                    "diverged there; lower the learning rate"
                )
        for name, array in update.items():
            self._add(self._sums[name].reshape(-1), array.reshape(-1), weight)
        self.weight += weight
        self.count += 1

    def mean(self) -> Mapping[str, NDArray[np.float64]]:
        """The weighted mean, float64; each tensor is computed when it is taken, and not kept.

        Raises:
            RoundError: nothing was folded.
        """
        if not self.weight:
            raise RoundError("no update was folded: there is no mean")
        return _Mean(self._sums, _SCALE * self.weight)

    @staticmethod
    def _add(total: NDArray[np.int64], values: NDArray[Any], weight: int) -> None:
        """Add by chunks, so that the temporaries stay small."""
        for start in range(0, values.size, _CHUNK):
            part = values[start : start + _CHUNK].astype(np.float64)
            part *= _SCALE
            total[start : start + _CHUNK] += np.rint(part, out=part).astype(np.int64) * weight


class _Mean(Mapping[str, NDArray[np.float64]]):
    """Sums over their weight: a mean that needs no memory of its own."""

    def __init__(self, sums: Mapping[str, NDArray[np.int64]], divisor: float) -> None:
        self._sums, self._divisor = sums, divisor

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return np.asarray(self._sums[name] / self._divisor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)
