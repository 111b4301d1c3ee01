"""A guarantee as it is printed: never an epsilon without delta, unit, neighbours and limits."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from fedseg.privacy.mechanisms import Mechanism

UNIT = "the patient, with all images, slices, patches and augmentations"
ADJACENCY = "two cohorts are neighbours when one has one patient more (add or remove one)"
COVERED = (
    "every number that left this site in the updates of these steps, and whatever anyone computes "
    "from them, with any knowledge besides"
)
NOT_COVERED = (
    "a patient known to two hospitals (each counts alone: the epsilons add up)",
    "relatives, and what is true of all patients alike",
    "how long answers take, unless the plan fixes when they leave",
    "what the coordinator chooses within the plan: models, rosters, settings",
    "outputs that are not listed above, such as metrics or counts that the policy lets out plain",
    "floating-point effects of the noise below its stated resolution",
)


@dataclass(frozen=True)
class Guarantee:
    """What was guaranteed to each patient, in full.

    Attributes:
        epsilon: an upper bound at `delta`.
        delta: the probability that is left out of the bound on epsilon.
        mechanisms: the work that it is about.
        rdp_epsilon: the looser bound by Renyi divergences, for comparison.
        private: False for a seeded run, which guarantees nothing.
    """

    epsilon: float
    delta: float
    mechanisms: tuple[Mechanism, ...]
    rdp_epsilon: float
    private: bool = True

    @property
    def sampling(self) -> str:
        """What is assumed of the draw of patients."""
        if all(each.rate == 1 for each in self.mechanisms):
            return "every patient is in every step (full batch); nothing is gained from sampling"
        return (
            "each step draws each patient on its own with the stated probability (Poisson), "
            "secretly and anew; any other way of choosing voids the figure"
        )

    @property
    def trust(self) -> str:
        """Whose noise the guarantee rests on."""
        if any(each.noise == "shared" for each in self.mechanisms):
            return "the sum of all sites' noise: it holds while the other sites add their share"
        return "this site's own noise: nobody else need be trusted"

    @property
    def text(self) -> str:
        """The guarantee in words; epsilon is rounded up."""
        if not self.private:
            return "NOT PRIVATE: the noise of this run was seeded and can be taken away again."
        steps = "; ".join(
            f"{m.steps} with noise multiplier {m.noise_multiplier:.4g} and rate {m.rate:.4g}"
            for m in self.mechanisms
        )
        rows = [
            ("Guarantee", f"({rounded_up(self.epsilon)}, {self.delta:g})-differential privacy"),
            ("Unit", UNIT),
            ("Neighbours", ADJACENCY),
            ("Steps", steps or "none"),
            ("Sampling", self.sampling),
            ("Noise", self.trust),
            ("Accounting", f"PLD, confirmed by PRV within 1 %; RDP {rounded_up(self.rdp_epsilon)}"),
            ("Covered", COVERED),
            ("Not covered", ";\n             ".join(NOT_COVERED)),
        ]
        return "\n".join(f"{name + ':':12} {value}" for name, value in rows)


def rounded_up(epsilon: float) -> str:
    """An epsilon to three decimals below 1 and to two above, never rounded down."""
    places = 3 if epsilon < 1 else 2
    if epsilon == float("inf"):
        return "infinite"
    return f"{ceil(epsilon * 10**places - 1e-9) / 10**places:.{places}f}"
