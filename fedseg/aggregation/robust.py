"""How a round's updates become one, although some of the sites may lie: the plan's `combine`.

The mean and the norm bound fold an update and forget it. Median, trimmed mean, Krum and Multi-Krum
need all updates at once: each is written to a scratch folder and read again chunk by chunk, so that
memory is that of one model and of a chunk of every site. Arithmetic is float64 and goes in the
order of sites' names, ties in Krum too, so that the order of answers leaves no trace.

What a rule withstands is in its paper and in `fedseg.strategy`. None withstands a majority, and
none helps against sites that lie within the spread of the honest ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedseg.aggregation.accumulate import MeanAccumulator
from fedseg.aggregation.likeness import Likeness, Sketches
from fedseg.aggregation.spill import Spill
from fedseg.arrays import Arrays, seed_for
from fedseg.errors import RoundError
from fedseg.plan import StudyPlan
from fedseg.strategy import Krum, Mean, Median, MultiKrum, NormBound, TrimmedMean

Values = NDArray[np.float64]
OrderStatistic = Median | TrimmedMean | Krum | MultiKrum


class Combiner(Protocol):
    """Takes a round's updates one at a time and gives the one that they come to."""

    @property
    def weight(self) -> int:
        """Of all the updates together."""

    def fold(self, update: Arrays, weight: int, site: str) -> None:
        """Take one site's update; either all of it counts or nothing."""

    def mean(self) -> Arrays:
        """The one update that they come to, float64, by name."""

    def likenesses(self) -> Mapping[str, Likeness]:
        """Site -> how its update compares with the others' and with what they come to."""

    def close(self) -> None:
        """Remove what lies on disk. `mean` and `likenesses` were asked before."""


def combiner(plan: StudyPlan, folder: Path | None) -> Combiner:
    """What combines one round's updates as the plan says.

    Args:
        plan: built.
        folder: the scratch folder; made anew, and removed by `close`. Rules that forget an update
            once it is folded need none.

    Raises:
        StorageError: the folder cannot be made.
    """
    schema, rule = plan.built.updated, plan.aggregation.combine
    sketches = Sketches(schema, seed_for(plan.training.seed, "", 0, "sketch of updates"))
    if isinstance(rule, Mean | NormBound):
        bound = rule.norm if isinstance(rule, NormBound) else None
        return Folded(MeanAccumulator(schema), sketches, bound)
    if folder is None:
        raise ValueError(f"combine {rule.rule} needs a scratch folder for the updates of a round")
    return Spilled(rule, Spill(folder, schema), sketches)


class Folded:
    """The weighted mean, of updates as they came or scaled down to a norm.

    Args:
        bound: largest norm that an update has when it counts; None for as they came.
    """

    def __init__(self, total: MeanAccumulator, sketches: Sketches, bound: float | None) -> None:
        self._total, self._sketches, self._bound = total, sketches, bound
        self._shares: dict[str, float] = {}

    @property
    def weight(self) -> int:
        """Of all the updates together."""
        return self._total.weight

    def fold(self, update: Arrays, weight: int, site: str) -> None:
        """Add one update, scaled down where its norm is above the bound.

        Raises:
            RoundError: a value or the total weight is too large to be summed exactly.
            ValueError: other names or shapes than the plan's, or a site that was folded.
        """
        if site in self._shares:
            raise ValueError(f"an update of {site} was folded already")
        look, scale = self._sketches.look(update), 1.0
        if self._bound is not None and not look.norm <= self._bound:
            scale = self._bound / look.norm
        self._total.fold(update if scale == 1.0 else _Scaled(update, scale), weight)
        self._sketches.keep(site, look)
        self._shares[site] = scale * weight

    def mean(self) -> Arrays:
        """The weighted mean; see `MeanAccumulator` for its rounding."""
        return self._total.mean()

    def likenesses(self) -> dict[str, Likeness]:
        """Cosines are estimates from sketches; no update is here any more to give a distance."""
        beside, cosines = self._sketches.beside(), self._sketches.cosines(self._shares)
        return {site: replace(like, cosine=cosines[site]) for site, like in beside.items()}

    def close(self) -> None:
        """Nothing lies on disk."""


@dataclass(frozen=True)
class _Came:
    """What the updates of a round came to."""

    mean: dict[str, Values]
    likenesses: dict[str, Likeness]


class Spilled:
    """An order statistic of updates that lie on disk; every site counts once."""

    def __init__(self, rule: OrderStatistic, spill: Spill, sketches: Sketches) -> None:
        self._rule, self._spill, self._sketches = rule, spill, sketches
        self._came: _Came | None = None
        self.weight = 0

    def fold(self, update: Arrays, weight: int, site: str) -> None:
        """Write one update down.

        Raises:
            StorageError: the disk is full; nothing of the update is left.
            ValueError: other names, shapes or types than the plan's, or a site that is there.
        """
        self._spill.put(site, update)
        self._sketches.keep(site, self._sketches.look(update))
        self.weight += weight
        self._came = None

    def mean(self) -> Arrays:
        """The order statistic.

        Raises:
            RoundError: nothing was folded.
            StorageError: an update cannot be read back.
        """
        return self._combined().mean

    def likenesses(self) -> dict[str, Likeness]:
        """Cosine and distance are exact, the agreement is an estimate from sketches."""
        return self._combined().likenesses

    def close(self) -> None:
        """Remove the updates from disk."""
        self._spill.close()

    def _combined(self) -> _Came:
        """Combine all coordinates, once."""
        if self._came is None:
            self._came = self._combine()
        return self._came

    def _combine(self) -> _Came:
        """Go through the updates chunk by chunk, comparing each with what the chunk comes to."""
        if not self._spill.sites:
            raise RoundError("no update was folded: there is nothing to combine")
        by_rule = _by_rule(self._rule, self._spill)
        parts: dict[str, list[Values]] = {}
        products = np.zeros(len(self._spill.sites))
        distances, square = np.zeros_like(products), 0.0
        for name, _, values in self._spill.chunks():
            came = by_rule(values)
            parts.setdefault(name, []).append(came)
            with np.errstate(over="ignore", invalid="ignore"):
                products += np.sum(values * came, axis=1)
                distances += np.sum((values - came) ** 2, axis=1)
                square += float(np.sum(came * came))
        return _Came(self._shaped(parts), self._compared(products, distances, sqrt(square)))

    def _shaped(self, parts: dict[str, list[Values]]) -> dict[str, Values]:
        """Chunks as the tensors of the plan."""
        return {
            spec.name: np.concatenate(parts.pop(spec.name, [np.zeros(0)])).reshape(spec.shape)
            for spec in self._spill.schema
        }

    def _compared(self, products: Values, distances: Values, norm: float) -> dict[str, Likeness]:
        """Every site's update with what the round came to."""
        beside = self._sketches.beside()
        for site, product, distance in zip(self._spill.sites, products, distances, strict=True):
            both = self._sketches.norm(site) * norm
            cosine = float(product) / both if both else None
            beside[site] = replace(beside[site], cosine=cosine, distance=sqrt(float(distance)))
        return beside


def closest(distances: Values, byzantine: int, keep: int) -> list[int]:
    """The sites whose nearest neighbours are nearest (Blanchard et al., NeurIPS 2017).

    A site's score is the sum of the squared distances to its n - byzantine - 2 nearest others.

    Args:
        distances: squared L2, shape (n, n), symmetric; rows in the order of names.
        keep: how many to choose.

    Returns:
        Their rows in ascending order; of equal scores the first ones are chosen.
    """
    n = len(distances)
    near = n - byzantine - 2
    assert near >= 1  # the plan's minimum_sites sees to it
    others = np.sort(distances + np.diag(np.full(n, np.inf)), axis=1)[:, :near]
    chosen = np.argsort(others.sum(axis=1), kind="stable")[:keep]
    return sorted(int(row) for row in chosen)


def _by_rule(rule: OrderStatistic, spill: Spill) -> Callable[[Values], Values]:
    """The rule for one chunk: values of shape (sites, n) to shape (n,)."""
    n = len(spill.sites)
    match rule:
        case Median():
            return lambda values: np.asarray(np.median(values, axis=0))
        case TrimmedMean(trim=trim):
            assert n > 2 * trim  # the plan's minimum_sites sees to it
            return lambda values: np.sort(values, axis=0)[trim : n - trim].mean(axis=0)
        case Krum(byzantine=byzantine):
            chosen = closest(_distances(spill), byzantine, 1)
        case MultiKrum(byzantine=byzantine, keep=keep):
            chosen = closest(_distances(spill), byzantine, keep or n - byzantine)
    return lambda values: values[chosen].mean(axis=0)


def _distances(spill: Spill) -> Values:
    """Squared L2 distances between the sites' updates, from differences: nothing cancels."""
    n = len(spill.sites)
    found = np.zeros((n, n))
    for _, _, values in spill.chunks():
        for row in range(n - 1):
            apart = np.sum((values[row + 1 :] - values[row]) ** 2, axis=1)
            found[row, row + 1 :] += apart
            found[row + 1 :, row] += apart
    return found


class _Scaled(Mapping[str, NDArray[Any]]):
    """An update times a number; a tensor is computed when it is taken, and not kept."""

    def __init__(self, update: Arrays, scale: float) -> None:
        self._update, self._scale = update, scale

    def __getitem__(self, name: str) -> NDArray[Any]:
        return np.asarray(self._update[name].astype(np.float64) * self._scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._update)

    def __len__(self) -> int:
        return len(self._update)
