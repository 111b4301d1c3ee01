"""The shared model at every hospital: the worst and the spread first, the mean second.

A mean hides the hospital that a consortium breaks at. Every hospital counts once here, however many
patients it has, and only what its policy let leave is known: who withheld is named as withheld.
Nothing here needs numpy: the coordinator's page says the same as the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Literal

from fedseg.frozen import Frozen
from fedseg.measures import Metric
from fedseg.plan import StudyPlan
from fedseg.result import PatientScores, SiteAnswer, StageRecord, StudyResult, mean_of

Standing = Literal["measured", "withheld", "absent"]
STANDING_WORDS: dict[Standing, str] = {
    "measured": "measured",
    "withheld": "withheld",
    "absent": "nothing measured",
}
NOT_PASSED_ON = (
    "No hospital’s own model was measured at another hospital: by this plan no hospital’s model "
    "and no update is passed on to the others; what goes round is the combined model."
)
_BY_KRUM = " With Krum the combined model of a round is the shared one moved by one hospital alone."
_ORDER: tuple[Standing, ...] = ("measured", "withheld", "absent")


@dataclass(frozen=True)
class SiteScore:
    """The shared model at one hospital: metric -> mean over its held-back patients and labels.

    `patients` is how many were measured, None where that is not told.
    """

    site: str
    standing: Standing
    values: dict[Metric, float]
    patients: int | None = None


class Spread(Frozen):
    """How differently one metric turns out at the hospitals; each counts once.

    Attributes:
        deviation: standard deviation over these hospitals, which are all that there are.
        gap: how much worse than the mean the worst hospital fares, never negative.
        jain: Jain's index, sum(x)^2 / (n * sum(x^2)): 1 where all fare alike, 1 / n where one alone
            has anything (Jain, Chiu and Hawe, DEC TR-301, 1984); 1 where all have zero.
    """

    metric: Metric
    worst_site: str
    worst: float
    best_site: str
    best: float
    mean: float
    deviation: float
    gap: float
    jain: float


@dataclass(frozen=True)
class CrossSite:
    """The shared model at every hospital, the worst first, then those who withheld or are missing.

    Attributes:
        round: after which it was measured, None where it was never asked for.
        spread: of each metric that at least two hospitals told.
        noised: the numbers left with the plan's noise, which is part of the spread.
    """

    round: int | None
    scores: tuple[SiteScore, ...]
    spread: tuple[Spread, ...]
    noised: bool

    def named(self, standing: Standing) -> tuple[str, ...]:
        """The hospitals of one standing."""
        return tuple(score.site for score in self.scores if score.standing == standing)


def across(plan: StudyPlan, stages: Sequence[StageRecord], sites: Sequence[str] = ()) -> CrossSite:
    """What the coordinator knows of the last model that was measured.

    Args:
        stages: the study's history.
        sites: who is enrolled besides those who ever answered.
    """
    measured = [record for record in stages if record.stage == "evaluate"]
    answers = {a.site: a for a in measured[-1].answers} if measured else {}
    everyone = everyone_in(stages, sites)
    noised = plan.privacy.outputs.metrics == "noised"
    scores = [told(site, answers.get(site), plan) for site in everyone]
    return compared(scores, round_=measured[-1].round if measured else None, noised=noised)


def simulated(result: StudyResult) -> CrossSite | None:
    """The shared model by the patients of a simulation; None where it was not measured."""
    arm = result.arm("federated")
    if arm is None:
        return None
    metrics = result.plan.evaluation.metrics
    scores = [_seen(site.name, arm.of_site(site.name), metrics) for site in result.sites]
    return compared(scores, round_=result.plan.aggregation.rounds)


def compared(scores: Iterable[SiteScore], *, round_: int | None, noised: bool = False) -> CrossSite:
    """Hospitals in the order worst Dice first, and the spread of every metric."""
    ordered = sorted(
        scores, key=lambda s: (_ORDER.index(s.standing), s.values.get("dice", 2.0), s.site)
    )
    metrics = dict.fromkeys(metric for score in ordered for metric in score.values)
    spread = tuple(found for metric in metrics if (found := spread_of(metric, ordered)))
    return CrossSite(round_, tuple(ordered), spread, noised)


def spread_of(metric: Metric, scores: Sequence[SiteScore]) -> Spread | None:
    """Worst, best and spread of one metric; None below two hospitals that told it."""
    known = [(score.values[metric], score.site) for score in scores if metric in score.values]
    if len(known) < 2:
        return None
    low, high = min(known), max(known)
    worst, best = (high, low) if metric == "hd95" else (low, high)
    values = [value for value, _ in known]
    mean, squares = fmean(values), sum(value * value for value in values)
    return Spread(
        metric=metric,
        worst_site=worst[1],
        worst=worst[0],
        best_site=best[1],
        best=best[0],
        mean=mean,
        deviation=pstdev(values),
        gap=abs(mean - worst[0]),
        jain=sum(values) ** 2 / (len(values) * squares) if squares else 1.0,
    )


def sentences(found: CrossSite) -> tuple[str, ...]:
    """The worst hospital first, what the spread means, who is not known, the mean last."""
    said = [_absent(found)] if not found.named("measured") else []
    dice = next((spread for spread in found.spread if spread.metric == "dice"), None)
    if dice is not None:
        known = len(found.named("measured"))
        said += [
            f"The shared model fares worst at {dice.worst_site}: Dice {number(dice.worst)}, "
            f"{number(dice.gap)} below the mean of the {known} hospitals that told.",
            f"It fares best at {dice.best_site} with {number(dice.best)}. The standard deviation "
            f"over the hospitals is {number(dice.deviation)}, and Jain’s index "
            f"{number(dice.jain, 4)}: 1 would be the same everywhere, {number(1 / known)} all "
            "at one hospital. It stays close to 1 even where one hospital lags, so look at the "
            "worst one.",
        ]
    if found.noised and found.named("measured"):
        said.append("These numbers left with noise, which makes hospitals look less alike.")
    if held := found.named("withheld"):
        said.append(f"Withheld: {listed(held)}. The worst hospital may be among those.")
    if away := found.named("absent") if found.named("measured") else ():
        said.append(f"Nothing was measured lately at {listed(away)}.")
    if dice is not None:
        said.append(f"The mean over hospitals, each counted once, is {number(dice.mean)}.")
    return tuple(said)


def own_elsewhere(plan: StudyPlan) -> str:
    """Why there is no hospital's own model in the comparison."""
    return NOT_PASSED_ON + (_BY_KRUM if plan.aggregation.combine.rule == "krum" else "")


def everyone_in(stages: Sequence[StageRecord], sites: Sequence[str]) -> list[str]:
    """Those sites and all who ever answered, by name."""
    return sorted({*sites, *(a.site for record in stages for a in record.answers)})


def told(site: str, answer: SiteAnswer | None, plan: StudyPlan) -> SiteScore:
    """One hospital as the coordinator knows it; None where it did not answer."""
    hidden = plan.privacy.outputs.metrics == "none"
    if answer is None:
        return SiteScore(site, "withheld" if hidden else "absent", {})
    values = _values({m: mean_of(answer.scores.get(m, {})) for m in plan.evaluation.metrics})
    if not values and answer.patients == 0:
        return SiteScore(site, "absent", {}, 0)
    return SiteScore(site, "measured" if values else "withheld", values, answer.patients)


def number(value: float, digits: int = 3) -> str:
    """A true minus sign, and three decimals unless more are asked for."""
    return f"{value + 0.0:.{digits}f}".replace("-", "−")


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _absent(found: CrossSite) -> str:
    """Why no hospital's number is known."""
    if found.round is None and not found.named("withheld"):
        return "The shared model was not measured at any hospital yet."
    return "No hospital’s number is known to the coordinator."


def _seen(site: str, patients: Sequence[PatientScores], metrics: Sequence[Metric]) -> SiteScore:
    """One hospital of a simulation: a mean over its patients of their means over the labels."""
    per_patient = {m: {p.patient: mean_of(p.of(m)) for p in patients} for m in metrics}
    values = _values({metric: mean_of(own) for metric, own in per_patient.items()})
    return SiteScore(site, "measured" if values else "absent", values, len(patients))


def _values(found: dict[Metric, float | None]) -> dict[Metric, float]:
    """The metrics that have a value."""
    return {metric: value for metric, value in found.items() if value is not None}
