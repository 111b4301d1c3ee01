"""What a study found, in numbers and in one sentence: the arms compared, hospital by hospital.

Every Dice is a patient's mean over the foreground labels, every mean is over patients, and an
interval is a 95 % bootstrap over patients, six or more. Differences are paired: the same patient in
two arms. A patient without a value (no label in truth or prediction) is left out of that metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Literal

from fedseg.aggregation.suspicions import sentence, suspicions
from fedseg.evaluation import estimates
from fedseg.measures import Metric
from fedseg.result import Arm, ArmName, PatientScores, StudyResult, mean_of

ARMS: tuple[ArmName, ...] = ("initial", "local", "federated", "finetuned", "pooled")
Judgement = Literal["better", "worse", "open", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """A mean over patients; no interval from fewer than six, no mean from none."""

    patients: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def judgement(self) -> Judgement:
        """For a difference: is the whole interval above or below zero?"""
        if self.low is None or self.high is None:
            return "unknown"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "open"


@dataclass(frozen=True)
class Row:
    """One hospital, or all of them, in one metric: a cell an arm and the gain of federating."""

    name: str
    cells: dict[ArmName, Estimate]
    gain: Estimate | None
    worst: bool = False


@dataclass(frozen=True)
class Table:
    """One metric, all hospitals, and all patients together."""

    metric: Metric
    arms: tuple[ArmName, ...]
    rows: tuple[Row, ...]
    total: Row


def value_of(patient: PatientScores, metric: Metric) -> float | None:
    """The patient's mean over the labels in one metric."""
    return mean_of(patient.of(metric))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of as many values as there are."""
    return Estimate(len(values), *_interval(tuple(values)))


def difference(one: Arm, other: Arm, metric: Metric, site: str | None = None) -> Estimate:
    """One arm minus the other over the patients that both have a value for."""
    values = _values(other, metric, site)
    pairs = [(v, values[key]) for key, v in _values(one, metric, site).items() if key in values]
    return estimate([a - b for a, b in pairs])


def table(result: StudyResult, metric: Metric) -> Table:
    """All arms in one metric; the hospital with the lowest federated mean Dice is marked worst."""
    arms = tuple(arm for name in ARMS if (arm := result.arm(name)))
    worst = worst_site(result)
    rows = tuple(_row(arms, metric, site.name, worst == site.name) for site in result.sites)
    return Table(metric, tuple(arm.name for arm in arms), rows, _row(arms, metric, None, False))


def worst_site(result: StudyResult) -> str | None:
    """The hospital where the federated model's mean Dice is lowest; None below two hospitals."""
    arm = result.arm("federated")
    if arm is None:
        return None
    means = [
        (fmean(known), site.name)
        for site in result.sites
        if (known := list(_values(arm, "dice", site.name).values()))
    ]
    return min(means)[1] if len(means) > 1 else None


def label_means(result: StudyResult, label: str) -> dict[ArmName, Estimate]:
    """Each arm's Dice of one label over all patients."""
    return {
        arm.name: estimate([v for p in arm.patients if (v := p.dice.get(label)) is not None])
        for name in ARMS
        if (arm := result.arm(name))
    }


def verdict(result: StudyResult) -> tuple[str, ...]:
    """The outcome in plain sentences, the most important first."""
    arm = result.arm("federated")
    if arm is None:
        return ("No shared model was measured in this study.",)
    dice = _mean(arm, "dice")
    if dice.mean is None:
        return (
            "The shared model was trained, but no held-back patient gave a Dice score: "
            "this study does not say how good it is.",
        )
    said = [
        f"The shared model reached a mean Dice of {number(dice.mean)} on "
        f"{count(dice.patients, 'patient')} that no hospital trained on."
    ]
    local, pooled = result.arm("local"), result.arm("pooled")
    if initial := result.arm("initial"):
        said.append(_over_initial(difference(arm, initial, "dice"), initial))
    if local:
        said.append(_against(difference(arm, local, "dice")))
        said.extend(_exceptions(table(result, "dice")))
    if own := result.arm("finetuned"):
        said.append(_fine_tuned(difference(own, arm, "dice"), own))
    if pooled:
        said.append(_below_pooled(difference(arm, pooled, "dice"), pooled))
    if not local and not pooled:
        said.append("No baseline was trained, so there is nothing to compare it with.")
    return tuple(said)


def suspicious(result: StudyResult) -> tuple[str, ...]:
    """Whose updates stood out, and why; a reason to look and no verdict."""
    return tuple(sentence(site, said) for site, said in suspicions(result.stages).items())


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A number for people: a true minus sign, never minus zero, a dash where there is none."""
    if value is None:
        return "–"
    text = f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"
    return text.replace("-", "−")


def interval(value: Estimate, signed: bool = False) -> str:
    """The interval in words."""
    low, high = (number(end, signed=signed) for end in (value.low, value.high))
    return f"95 % interval {low} to {high}"


def count(amount: int, noun: str) -> str:
    """`1 patient`, `2 patients`, `1,200 patients`."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def _against(gain: Estimate) -> str:
    """The shared model against each hospital's own, over all patients."""
    other = "what each hospital had alone"
    if gain.mean is None:
        return f"No patient could be compared with {other}."
    if gain.judgement == "unknown":
        whom = "one patient" if gain.patients == 1 else f"{gain.patients} patients"
        return (
            f"On the {whom} compared it is {number(gain.mean, signed=True)} against {other}: too "
            "few to say more."
        )
    if gain.judgement == "open":
        return (
            f"The study shows no clear difference from {other}: {number(gain.mean, signed=True)} "
            f"on average ({interval(gain, signed=True)})."
        )
    size = Estimate(gain.patients, *_size(gain))
    return f"It is {gain.judgement} than {other} by {number(size.mean)} ({interval(size)})."


def _exceptions(dice: Table) -> tuple[str, ...]:
    """The hospitals that the shared model serves less well than their own, or that none are."""
    gains = [
        (row.name, row.gain.mean) for row in dice.rows if row.gain and row.gain.mean is not None
    ]
    if len(gains) < 2:
        return ()
    losing = [f"{name} ({number(gain, signed=True)})" for name, gain in gains if gain <= 0]
    if losing:
        return (f"It is not better on average at {', '.join(losing)}.",)
    name, least = min(gains, key=lambda pair: pair[1])
    return (
        f"Every one of the {len(gains)} hospitals gains; "
        f"{name} gains least ({number(least, signed=True)}).",
    )


def _over_initial(gain: Estimate, initial: Arm) -> str:
    """The shared model against what the study started from."""
    start = _mean(initial, "dice")
    if gain.mean is None or start.mean is None:
        return "How much of that the initial model reached before any training is not known."
    ends = "" if gain.low is None else f" ({interval(gain, signed=True)})"
    return (
        f"The initial model reached {number(start.mean)} before any training; the study added "
        f"{number(gain.mean, signed=True)}{ends}."
    )


def _fine_tuned(gain: Estimate, own: Arm) -> str:
    """What each hospital made of the shared model, against it."""
    reached = _mean(own, "dice")
    if gain.mean is None or reached.mean is None:
        return "What fine-tuning at each hospital reached is not known."
    return (
        f"Fine-tuned at each hospital on its own patients it reaches {number(reached.mean)} "
        f"({_signed(gain)})."
    )


def _below_pooled(gap: Estimate, pooled: Arm) -> str:
    """How far the shared model is from training on all data in one place."""
    top = _mean(pooled, "dice")
    if top.mean is None or gap.mean is None:
        return "Training on all data in one place gave no score to compare with."
    return (
        f"Training on all data in one place reached {number(top.mean)} "
        f"(shared model against it: {_signed(gap)})."
    )


def _signed(gain: Estimate) -> str:
    """A difference, with its interval where there is one."""
    ends = "" if gain.low is None else f", {interval(gain, signed=True)}"
    return f"{number(gain.mean, signed=True)}{ends}"


def _size(gain: Estimate) -> tuple[float, float, float]:
    """Mean, low and high of a difference's size, for where the words already say its direction."""
    low, high = sorted((abs(gain.low or 0.0), abs(gain.high or 0.0)))
    return abs(gain.mean or 0.0), low, high


def _row(arms: Sequence[Arm], metric: Metric, site: str | None, worst: bool) -> Row:
    """One line of a table; `site` None means all patients."""
    cells = {arm.name: _mean(arm, metric, site) for arm in arms}
    by_name = {arm.name: arm for arm in arms}
    gain = None
    if "federated" in by_name and "local" in by_name:
        gain = difference(by_name["federated"], by_name["local"], metric, site)
    return Row(site or "All patients", cells, gain, worst)


def _mean(arm: Arm, metric: Metric, site: str | None = None) -> Estimate:
    """One arm in one metric, of one site or of all."""
    return estimate(list(_values(arm, metric, site).values()))


def _values(arm: Arm, metric: Metric, site: str | None) -> dict[tuple[str, str], float]:
    """(site, patient) -> value of the patients that have one, of one site or of all."""
    chosen = arm.patients if site is None else arm.of_site(site)
    found = {(p.site, p.patient): value_of(p, metric) for p in chosen}
    return {key: value for key, value in found.items() if value is not None}


@lru_cache(maxsize=1024)
def _interval(values: tuple[float, ...]) -> tuple[float | None, float | None, float | None]:
    """(mean, low, high); the same values are not drawn from twice."""
    found = estimates.estimate(values)
    return found.mean, found.low, found.high
