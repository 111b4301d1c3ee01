"""What was done to patients' data, as an accountant needs it: Gaussian noise, a rate, a count.

A mechanism is the sampled Gaussian: each patient is drawn on its own with probability `rate`
(Poisson sampling; 1 is the full batch), contributes a vector of norm at most C, and noise of
standard deviation `noise_multiplier` times C is added to the sum. Two data sets are neighbours when
one has one patient more. Mechanisms are stored and composed; their epsilon is never stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from fedseg.frozen import Frozen

MAX_STEPS = 1_000_000

Whose = Literal["site", "shared"]
Use = Literal["train", "val"]


class Mechanism(Frozen):
    """Sampled Gaussian mechanisms in a row, all of one kind.

    Attributes:
        noise_multiplier: standard deviation over clip norm, of the noise that the guarantee relies
            on: this site's own, or the sum of all sites' shares.
        rate: the probability with which a patient is in a step.
        steps: how many releases, each with fresh noise.
        noise: whose noise it is. `shared` holds only while the other sites add theirs.
    """

    noise_multiplier: Annotated[float, Field(ge=0.05, le=1e6, allow_inf_nan=False)]
    rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 1
    noise: Whose = "site"

    def of_records(self, records: int) -> Mechanism:
        """What it is for a person who is in the cohort under several ids.

        Of k records a binomial number is drawn, each of which moves the sum by at most C. All k at
        once with the probability 1 - (1 - rate)^k that any is drawn is stochastically larger, and
        a mixture of Gaussians with larger shifts dominates one with smaller (Ganesh, "Tight
        group-level DP guarantees for DP-SGD with sampling", arXiv 2401.10294).
        """
        if records == 1:
            return self
        rate = 1.0 - (1.0 - self.rate) ** records
        return self.model_copy(
            update={"noise_multiplier": self.noise_multiplier / records, "rate": rate}
        )


class Allowed(Frozen):
    """So many steps of one mechanism, on the patients of one use."""

    use: Use
    mechanism: Mechanism


def merged(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """The same work with equal kinds counted together; the order does not matter to anyone."""
    counts: dict[tuple[float, float, Whose], int] = {}
    for each in mechanisms:
        kind = (each.noise_multiplier, each.rate, each.noise)
        counts[kind] = counts.get(kind, 0) + each.steps
    return tuple(
        Mechanism.model_construct(noise_multiplier=s, rate=q, steps=n, noise=whose)
        for (s, q, whose), n in sorted(counts.items())
    )
