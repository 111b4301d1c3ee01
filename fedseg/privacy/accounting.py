"""How much noise a guarantee takes, and what guarantee the noise that was added gives.

Inside a study the schedule is fixed before it begins: calibrate the noise with `calibrate`, and
state what was done with `state`. The epsilon is that of the PLD accountant, which errs to the safe
side alone; PRV, which shares no numerics with it, must agree, and RDP must not be below. Across
studies, each chosen after the last was seen, such composition is not proved: there `PrivacyFilter`
decides. Neighbours differ by one patient, whole, who is added or removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, log

from fedseg.errors import PrivacyError
from fedseg.privacy.guarantee import Guarantee
from fedseg.privacy.lossdist import epsilon_of
from fedseg.privacy.mechanisms import Mechanism, merged
from fedseg.privacy.opinions import ORDERS, conversion, prv_epsilon, rdp, rdp_epsilon

AGREEMENT = 0.01
_PRECISION = 1e-4
_LEAST_NOISE, _MOST_NOISE = 0.2, 1e5


@dataclass(frozen=True)
class Opinions:
    """What three accountants say of the same work; epsilons at one delta.

    Attributes:
        pld: from above; what is stated.
        prv_low: PRV's lower end.
        prv_high: PRV's upper end.
        rdp: the loose upper bound.
    """

    pld: float
    prv_low: float
    prv_high: float
    rdp: float

    @property
    def agree(self) -> bool:
        """Whether PLD and PRV are within 1 % of each other and RDP is not below."""
        middle, error = (self.prv_low + self.prv_high) / 2, (self.prv_high - self.prv_low) / 2
        near = abs(self.pld - middle) <= AGREEMENT * middle + error
        return near and self.rdp >= self.prv_low


def epsilon_spent(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The epsilon of all that was done, from above (PLD).

    Raises:
        PrivacyError: delta is below 1e-9, or the noise is too small to account for.
    """
    return epsilon_of(merged(mechanisms), delta)


def opinions(mechanisms: Iterable[Mechanism], delta: float) -> Opinions:
    """Ask all three accountants; seconds, where `epsilon_spent` takes a twentieth of one."""
    work = merged(mechanisms)
    low, high = prv_epsilon(work, delta)
    return Opinions(epsilon_of(work, delta), low, high, rdp_epsilon(work, delta))


def calibrate(
    epsilon: float,
    delta: float,
    schedule: Sequence[tuple[float, int]],
    besides: Sequence[Mechanism] = (),
) -> float:
    """The least noise multiplier with which a fixed schedule keeps (epsilon, delta).

    Args:
        epsilon: to be kept by all steps together.
        delta: likewise.
        schedule: (rate, steps), each with the noise that is looked for.
        besides: what is released too with noise that is fixed already, such as metrics.

    Returns:
        A noise multiplier at most 0.01 % above the least; rounded up, never down.

    Raises:
        PrivacyError: no noise is enough, because `besides` alone spends it.
    """
    if not (isfinite(epsilon) and epsilon > 0 and schedule):
        raise PrivacyError(f"an epsilon above 0 and at least one step are needed, not {epsilon}")

    def kept(noise: float) -> bool:
        planned = [Mechanism(noise_multiplier=noise, rate=q, steps=n) for q, n in schedule]
        return epsilon_spent([*planned, *besides], delta) <= epsilon

    return _least(kept, epsilon, delta)


def _least(kept: Callable[[float], bool], epsilon: float, delta: float) -> float:
    """The least noise that keeps the promise, by bisection of its logarithm."""
    low, high = _LEAST_NOISE, 1.0
    while not kept(high):
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise PrivacyError(
                f"no noise keeps epsilon {epsilon:g} at delta {delta:g}: allow more, or release "
                "less besides the training"
            )
    while high > low * (1 + _PRECISION):
        middle = float((low * high) ** 0.5)
        low, high = (low, middle) if kept(middle) else (middle, high)
    return high


def state(mechanisms: Iterable[Mechanism], delta: float) -> Guarantee:
    """The guarantee that what was done gives, once two accountants agree on it.

    Raises:
        PrivacyError: they do not agree within 1 %: nothing is to be promised before it is known
            why.
    """
    work = merged(mechanisms)
    found = opinions(work, delta)
    if not found.agree:
        raise PrivacyError(
            f"the accountants disagree: PLD {found.pld:.4g}, PRV {found.prv_high:.4g}, RDP "
            f"{found.rdp:.4g} at delta {delta:g}; report this with the schedule, promise nothing"
        )
    return Guarantee(found.pld, delta, work, found.rdp)


@dataclass(frozen=True)
class PrivacyFilter:
    """The stop rule for work that is chosen after seeing earlier work (Feldman and Zrnic 2021).

    Renyi divergences at one order, fixed before anything is released, are added up; as long as the
    sum stays within the budget of that order, all that was done together keeps (epsilon, delta),
    however each mechanism was chosen, and for each patient by the patient's own sum (their
    Theorem 4.3). What a patient has left depends on data: it must not leave the hospital.

    Attributes:
        epsilon: never to be exceeded, over all studies.
        delta: likewise.
        order: the Renyi order, fixed.
    """

    epsilon: float
    delta: float
    order: float

    @classmethod
    def for_budget(cls, epsilon: float, delta: float) -> PrivacyFilter:
        """With the order at which most full-batch work fits.

        Raises:
            PrivacyError: no order has room, or the numbers are no budget.
        """
        if not (isfinite(epsilon) and epsilon > 0 and 0 < delta < 1):
            raise PrivacyError("a budget needs an epsilon above 0 and a delta between 0 and 1")
        order = max(ORDERS, key=lambda each: (epsilon - conversion(each, delta)) / each)
        found = cls(epsilon, delta, order)
        if found.budget <= 0:
            raise PrivacyError(
                f"epsilon {epsilon:g} at delta {delta:g} has no room for anything: allow a larger "
                "epsilon or delta"
            )
        return found

    @property
    def budget(self) -> float:
        """The largest sum of Renyi divergences; may be below 0, then nothing fits."""
        return self.epsilon - conversion(self.order, self.delta)

    def cost(self, mechanisms: Iterable[Mechanism]) -> float:
        """What mechanisms add to the sum."""
        return sum(rdp(each, self.order) for each in mechanisms)

    def room(self, spent: float, more: float = 0.0) -> bool:
        """Whether a sum and an addition to it stay within the budget."""
        return spent + more <= self.budget

    def share(self, spent: float) -> float:
        """How much of the budget a sum is, from 0 to 1 and above."""
        return spent / self.budget if self.budget > 0 else float("inf")

    def epsilon_so_far(self, spent: float) -> float:
        """The epsilon at `delta` that a sum stands for at this order; 0 for nothing at all."""
        return max(0.0, spent + conversion(self.order, self.delta)) if spent > 0 else 0.0


def require_small_delta(delta: float, patients: int) -> None:
    """Accept a delta that cannot hide the publication of a patient.

    Raises:
        PrivacyError: delta times the number of patients is 1 or more.
    """
    if not 0 < delta < 1 or delta * patients >= 1:
        sensible = 10 ** int(log(1 / max(patients, 2), 10) - 1)
        raise PrivacyError(
            f"delta {delta:g} is not below one over the {patients} patients of the cohort: whole "
            f"patients might be published with it; at most {sensible:g} is sensible"
        )
