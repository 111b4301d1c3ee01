"""What the page says of privacy: the guarantee in full, its meaning, loudly where none holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedseg.measures import Metric
from fedseg.plan import StudyPlan
from fedseg.privacy.guarantee import rounded_up
from fedseg.privacy.words import Output, guessed_right, not_covered, outputs_of, withheld
from fedseg.promise import LocalPrivacy
from fedseg.result import GuaranteeRecord, StudyResult

Standing = Literal["kept", "seeded", "none"]
METRIC_WORDS: dict[Metric, str] = {"dice": "Dice", "hd95": "HD95", "nsd": "surface Dice"}


@dataclass(frozen=True)
class Privacy:
    """What the page shows of a study's privacy.

    Attributes:
        standing: the guarantee holds; the noise was seeded, so that it does not; there is none.
        facts: names and values, empty without a guarantee.
        meaning: the bound in words; empty where none holds.
        outputs: what leaves besides updates, and how.
        text: the guarantee in full.
    """

    standing: Standing
    facts: tuple[tuple[str, str], ...]
    meaning: str
    outputs: tuple[Output, ...]
    text: str


def privacy_of(result: StudyResult) -> Privacy:
    """All that is to be said of a study's privacy."""
    record, privacy = result.guarantee, result.plan.private
    if record is None or privacy is None:
        return Privacy("none", (), "", outputs_of(result.plan), "")
    return Privacy(
        "kept" if record.private else "seeded",
        tuple(_facts(result.plan, privacy, record)),
        _meaning(result.plan, privacy) if record.private else "",
        outputs_of(result.plan),
        record.text,
    )


def sent(plan: StudyPlan) -> str:
    """Which messages went up to the coordinator, and what was in them."""
    counts = not withheld(plan, "counts")
    after = ["the change of these tensors"]
    after += ["the number of patients"] if counts else []
    after += ["the number of steps"]
    after += ["the mean loss"] if not withheld(plan, "losses") else []
    said = [f"after training, {_listed(after)}"]
    if not withheld(plan, "metrics"):
        names = ", ".join(METRIC_WORDS[metric] for metric in plan.evaluation.metrics)
        how = " with noise added" if plan.privacy.outputs.metrics == "noised" else ""
        means = f"mean {names} by label{how}"
        told = f"the number of held-back patients and their {means}"
        said.append("after measuring, " + (told if counts else f"the held-back patients’ {means}"))
    said.append(
        "at the start, numbers of patients and cases" if counts else "at the start, no number"
    )
    said.append("where a hospital refused, one code")
    few = [output.name for output in outputs_of(plan) if output.openness == "suppressed"]
    least = plan.privacy.outputs.suppress_below
    below = f" Withheld where about fewer than {least} patients: {_listed(few)}." if few else ""
    return f"Up to the coordinator went, {'; '.join(said)}.{below}"


def _facts(
    plan: StudyPlan, privacy: LocalPrivacy, record: GuaranteeRecord
) -> list[tuple[str, str]]:
    """The guarantee's numbers; what a seeded run spent is said as what it would have."""
    spent = "Spent by training" if record.private else "Would have spent, with secret noise"
    found = [
        ("Promised by the plan", f"epsilon {record.epsilon:g} at delta {record.delta:g}"),
        (spent, f"epsilon {rounded_up(record.epsilon_spent)} at delta {record.delta:g}"),
    ]
    if record.epsilon_held_back is not None:
        epsilon = rounded_up(record.epsilon_held_back)
        found.append(
            ("By metrics, held-back patients", f"epsilon {epsilon} at delta {record.delta:g}")
        )
    noise = f"{record.noise_multiplier:.4g} times the clip norm {privacy.clip_norm:g} a step"
    drawn = "every patient in every step"
    if privacy.rate < 1:
        drawn = f"each patient with probability {privacy.rate:g}, by itself (Poisson)"
    found += [
        ("Unit", "the patient, with all images; one patient more or less"),
        ("Noise", f"{noise}, each hospital its own"),
        ("Drawn", drawn),
        ("Steps", f"{plan.aggregation.rounds} rounds of {plan.training.steps_per_round}"),
    ]
    return found


def _meaning(plan: StudyPlan, privacy: LocalPrivacy) -> str:
    """What the promise bounds."""
    return (
        "Somebody who knows everything else and sees every update and model of the study can tell "
        "whether a certain patient was among those trained on, and be right, in at most "
        f"{100 * guessed_right(privacy):.1f} of 100 cases; blind guessing is right in 50. "
        f"{not_covered(plan)} A patient known to two hospitals is covered by each alone, and "
        "the two epsilons add up."
    )


def _listed(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
