"""What an audit says: the claim, the bound from below, how sure, how far it could see, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import floor
from typing import Any, Literal

from fedseg.aggregation.rounds import schedule
from fedseg.learning.private import promise_of
from fedseg.plan import StudyPlan
from fedseg.privacy.accounting import epsilon_spent
from fedseg.privacy.audit.bounds import Bound, llr, of_any, of_schedule
from fedseg.privacy.audit.canaries import Transcript, transcript
from fedseg.privacy.audit.checks import (
    SIGNIFICANT,
    Check,
    idle_check,
    noise_check,
    sampling_check,
    share_check,
)
from fedseg.privacy.audit.membership import Membership
from fedseg.privacy.audit.metrics import MetricsAudit, metrics_audited
from fedseg.privacy.audit.rounds import idle_rounds, one_patients_share
from fedseg.privacy.mechanisms import Mechanism
from fedseg.privacy.noise import Noise
from fedseg.privacy.schedule import done

CONFIDENCE = 0.95
IDLE = (100, 100)  # patients and steps of rounds in which nobody can be read
ROUNDING = 1e-3  # by which the accountant's epsilon may be above the plan's

Verdict = Literal["refuted", "not refuted"]


@dataclass(frozen=True)
class Audit:
    """All that was found.

    Attributes:
        claimed: the plan's epsilon.
        delta: the plan's.
        accounted: the epsilon of the plan's noise and schedule by the accountant.
        canaries: how many took part in the guessing.
        bound: on the schedule's privacy profile; the verdict rests on it and on the checks.
        any_mechanism: the bound without assumptions.
        checks: of noise and sampling by themselves.
        metrics: the same attack on noised metrics; None where the plan releases none.
        membership: on real patients; None where none were given.
    """

    claimed: float
    delta: float
    accounted: float
    canaries: int
    bound: Bound
    any_mechanism: Bound
    checks: tuple[Check, ...]
    metrics: MetricsAudit | None = None
    membership: Membership | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the claim does not hold; empty where nothing speaks against it."""
        found = []
        if self.bound.epsilon > self.claimed:
            found.append(
                f"canaries show an epsilon of at least {_down(self.bound.epsilon)}, above the "
                f"claimed {self.claimed:g}"
            )
        if self.metrics is not None and self.metrics.bound.epsilon > self.claimed:
            found.append(
                "noised metrics show an epsilon of at least "
                f"{_down(self.metrics.bound.epsilon)}, above the claimed {self.claimed:g}"
            )
        accounted = max(self.accounted, self.metrics.accounted if self.metrics else 0.0)
        if accounted > self.claimed * (1 + ROUNDING):
            found.append(
                f"the plan's noise and schedule give epsilon {accounted:.4g} by the "
                f"accountant, above the claimed {self.claimed:g}: build the plan again"
            )
        found += [
            f"{check.what}: expected {check.expected:.4g}, found {check.found:.4g} "
            f"(p = {check.p:.2g})"
            for check in self.checks
            if not check.holds
        ]
        return tuple(found)

    @property
    def verdict(self) -> Verdict:
        """`refuted`, or `not refuted`, which is no proof."""
        return "refuted" if self.reasons else "not refuted"

    @property
    def text(self) -> str:
        """The verdict in plain words."""
        if self.reasons:
            return "REFUTED: " + "; ".join(self.reasons)
        blind = " It could not have refuted the claim at all: take more canaries."
        bounds = [self.bound, *([self.metrics.bound] if self.metrics else ())]
        ceiling = min(bound.ceiling for bound in bounds)
        wrongly = sum(1 - bound.confidence for bound in bounds) + SIGNIFICANT * len(self.checks)
        return (
            f"Not refuted: nothing speaks against epsilon {self.claimed:g} at delta "
            f"{self.delta:g}. That is no proof. The audit can see an epsilon of up to "
            f"{_down(ceiling)}, and refutes an honest mechanism in at most {wrongly:.1%} of audits."
            + (blind if ceiling <= self.claimed else "")
        )

    @property
    def as_json(self) -> dict[str, Any]:
        """All figures, for machines."""
        return asdict(self) | {
            "unit": "patient",
            "checks": [asdict(check) | {"holds": check.holds} for check in self.checks],
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "text": self.text,
        }


def audited(
    plan: StudyPlan,
    sizes: Mapping[str, int],
    *,
    canaries: int,
    seed: int,
    progress: Callable[[str], None] = lambda _step: None,
) -> Audit:
    """Audit a plan: canaries over the whole study, the trainer's own round, noised metrics.

    Args:
        plan: private and built.
        sizes: trained tensors of its network by name, and how many numbers each has.
        canaries: in the thousands; see the ceiling. As many studies are run for noised metrics.
        seed: the same seed gives the same audit.
        progress: is told of each step.

    Raises:
        PlanError: the plan has no guarantee, or was not built.
    """
    seen = transcript(plan, sizes, canaries, seed, progress=progress)
    idle = idle_rounds(plan, *IDLE, Noise.seeded(seed, "audit draws"))
    metrics = metrics_audited(plan, canaries, seed, CONFIDENCE)
    found = judged(
        plan,
        seen,
        (
            sampling_check(idle.drawn, promise_of(plan).rate, seed),
            idle_check(idle.noise, plan.noise.training),
            share_check(one_patients_share(plan, seed)),
            *([metrics.check] if metrics else ()),
        ),
    )
    return replace(found, metrics=metrics)


def judged(plan: StudyPlan, seen: Transcript, besides: tuple[Check, ...] = ()) -> Audit:
    """What a transcript says about a plan's claim."""
    promise, work = promise_of(plan), whole_study(plan)
    scores = llr(seen.values, promise.rate)
    return Audit(
        claimed=promise.epsilon,
        delta=promise.delta,
        accounted=epsilon_spent([work], promise.delta),
        canaries=len(scores),
        bound=of_schedule(scores, seen.members, work, promise.delta, CONFIDENCE),
        any_mechanism=of_any(scores, seen.members, promise.delta, CONFIDENCE),
        checks=(noise_check(seen, plan.noise.training), *besides),
    )


def whole_study(plan: StudyPlan) -> Mechanism:
    """What all rounds of a private plan do to a training patient."""
    (work,) = done(plan, [stage for _, stage in schedule(plan)])
    return work


def _down(epsilon: float) -> str:
    """A lower bound, never rounded up."""
    return f"{floor(epsilon * 100) / 100:.2f}"
