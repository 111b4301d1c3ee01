"""How each site's update compares with the others': what a detector looks at.

Norms are exact. Cosines between sites come from a count sketch of each update (Charikar et al.,
ICALP 2002): coordinates with random signs, summed into `WIDTH` buckets, so that one pass and 128
kilobytes a site are enough, whatever the size of the model. A cosine that was estimated so is off
by about 0.01 (one standard deviation). The signs follow from the plan, so that equal studies give
equal figures; who knows them can shape an update that looks well here. It is a detector of faults
and of clumsy attacks; what withstands a clever one is the plan's rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import median

import numpy as np
from numpy.typing import NDArray

from fedseg.arrays import Arrays
from fedseg.schema import TensorSpec

WIDTH = 1 << 14
SAME = 0.999
_CHUNK = 16 * WIDTH
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Likeness:
    """One site's update beside the others'; None where it has no meaning.

    Attributes:
        norm: L2 norm of the update as the site sent it.
        agreement: median over the other sites of the cosine between the two updates.
        twin: the first other site by name whose update is the same but for its size.
        cosine: with what the round came to.
        distance: L2 distance to what the round came to, for rules that keep every update.
    """

    norm: float | None
    agreement: float | None = None
    twin: str | None = None
    cosine: float | None = None
    distance: float | None = None


@dataclass(frozen=True)
class Look:
    """An update's L2 norm and its sketch, shape (WIDTH,)."""

    norm: float
    sketch: Values


class Sketches:
    """Norms and sketches of a round's updates, by site.

    Args:
        schema: the tensors of an update.
        seed: of the signs; the same for all sites and rounds of a study.
    """

    def __init__(self, schema: tuple[TensorSpec, ...], seed: int) -> None:
        self._names = [spec.name for spec in schema]
        self._seed = seed
        self._looks: dict[str, Look] = {}

    def look(self, update: Arrays) -> Look:
        """What is to be remembered of one update."""
        signs = np.random.Generator(np.random.PCG64(self._seed))
        square, sketch = 0.0, np.zeros(WIDTH)
        with np.errstate(over="ignore", invalid="ignore"):
            for name in self._names:
                values = update[name].reshape(-1)
                for start in range(0, values.size, _CHUNK):
                    part = values[start : start + _CHUNK].astype(np.float64)
                    square += float(np.sum(part * part))
                    sketch += _folded(part, signs)
        return Look(sqrt(square), sketch)

    def keep(self, site: str, look: Look) -> None:
        """Count a site's update among those that are compared."""
        self._looks[site] = look

    def norm(self, site: str) -> float:
        """L2 norm of a site's update."""
        return self._looks[site].norm

    def beside(self) -> dict[str, Likeness]:
        """Site -> norm, agreement with the others, and twin; the rest is for who combines them."""
        sites = sorted(self._looks)
        between = {
            (one, other): _cosine(self._looks[one].sketch, self._looks[other].sketch)
            for i, one in enumerate(sites)
            for other in sites[i + 1 :]
        }
        found = {}
        for site in sites:
            cosines = {
                other: value
                for pair, value in between.items()
                if site in pair and value is not None
                for other in pair
                if other != site
            }
            twins = sorted(other for other, value in cosines.items() if value > SAME)
            found[site] = Likeness(
                norm=self.norm(site),
                agreement=median(cosines.values()) if cosines else None,
                twin=twins[0] if twins else None,
            )
        return found

    def cosines(self, shares: Mapping[str, float]) -> dict[str, float | None]:
        """Site -> cosine with the sum of all updates, each times its share."""
        came = np.zeros(WIDTH)
        for site in sorted(shares):
            came += shares[site] * self._looks[site].sketch
        return {site: _cosine(self._looks[site].sketch, came) for site in shares}


def known(value: float | None, digits: int = 6) -> float | None:
    """A figure for the record: so many significant digits, and None for what is no number."""
    return None if value is None or not isfinite(value) else float(f"{value:.{digits}g}")


def _folded(part: Values, signs: np.random.Generator) -> Values:
    """A chunk with random signs, summed into the sketch's buckets."""
    bits = np.frombuffer(signs.bytes((part.size + 7) // 8), np.uint8)
    signed = np.where(np.unpackbits(bits, count=part.size), part, -part)
    signed.resize(-(-part.size // WIDTH) * WIDTH)
    return np.asarray(signed.reshape(-1, WIDTH).sum(axis=0))


def _cosine(one: Values, other: Values) -> float | None:
    """Of two vectors; None where one of them is zero or too large."""
    with np.errstate(over="ignore", invalid="ignore"):
        size = sqrt(float(np.sum(one * one))) * sqrt(float(np.sum(other * other)))
        value = float(np.sum(one * other)) / size if size else float("nan")
    return value if isfinite(value) else None
