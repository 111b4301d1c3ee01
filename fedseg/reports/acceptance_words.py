"""An acceptance report in words: the verdict, its thresholds, the models and what protects whom.

Everything is said as the result has it; nothing here decides anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fedseg.evaluation.evidence import Measure
from fedseg.evaluation.observations import FailureKind
from fedseg.evaluation.validation import Candidate, Check, Decision, Met, ValidationResult
from fedseg.modelfile import FINETUNED
from fedseg.plan import StudyPlan
from fedseg.privacy.words import in_one_line, not_covered
from fedseg.reports import findings

MOST_REASONS = 2
DECISIONS: dict[Decision, str] = {"go": "GO", "no-go": "NO-GO", "undecided": "UNDECIDED"}
KINDS: dict[str, str] = {
    "global": "the study’s shared model",
    "own": "this hospital’s own part of the study’s model",
    "finetuned": "the shared model, fine-tuned at this hospital",
    "local": "a model trained at this hospital alone",
    "pooled": "a model trained on all hospitals’ data in one place",
    "initial": "the model that the study started from",
}
THRESHOLDS: dict[str, str] = {
    "dice_at_least": "Mean Dice, at least",
    "worst_case_dice_at_least": "Dice of the worst patient, at least",
    "failures_share_at_most": "Patients with an empty or wild prediction, at most",
    "volume_bias_percent_at_most": "Bias of the volume, at most",
    "hd95_mm_at_most": "Mean HD95, at most",
    "patients_at_least": "Patients measured, at least",
}
FAILURES: dict[FailureKind, str] = {
    "empty": "nothing found",
    "invented": "found where there is none",
    "volume": "far too large or too small",
    "far": "in the wrong place",
}
MEASURES: dict[Measure, tuple[str, int]] = {
    "dice": ("Dice", 3),
    "hd95_mm": ("HD95 in mm", 2),
    "nsd": ("Surface Dice", 3),
    "volume_error_percent": ("Volume error in %, without sign", 1),
}
_MET_ORDER: tuple[Met, ...] = ("broken", "undecided", "met")
_MET_WORDS: dict[Met, str] = {"met": "holds", "broken": "DOES NOT HOLD", "undecided": "undecided"}


@dataclass(frozen=True)
class CheckLine:
    """One threshold in words: what was asked, what was measured, and whether it holds."""

    name: str
    words: str
    asked: str
    found: str
    met: Met
    met_words: str


def headline(result: ValidationResult) -> str:
    """The verdict in one sentence."""
    name = result.verdict.recommended
    match result.verdict.decision:
        case "go":
            return f"The model “{name}” keeps every threshold that {result.site} set."
        case "no-go" if name is None:
            return f"No model keeps the thresholds that {result.site} set."
        case "no-go":
            return f"Do not use the model “{name}” here: a threshold does not hold."
        case _ if result.thresholds is None or not result.thresholds.asked:
            return f"{result.site} set no thresholds beforehand, so nothing is decided here."
        case _:
            return "These patients do not decide whether a model may be used here."


def check_lines(checks: Iterable[Check]) -> tuple[CheckLine, ...]:
    """Thresholds with their values for people, the broken ones first."""
    ordered = sorted(checks, key=lambda check: _MET_ORDER.index(check.met))
    return tuple(
        CheckLine(
            name=THRESHOLDS.get(check.threshold, check.threshold),
            words=check.words,
            asked=_amount(check.threshold, check.asked),
            found=_amount(check.threshold, check.found),
            met=check.met,
            met_words=_MET_WORDS[check.met],
        )
        for check in ordered
    )


def privacy_words(candidate: Candidate, plan: StudyPlan | None) -> str:
    """What patients were guaranteed whom a candidate's federated training saw."""
    if candidate.private is False and candidate.arm == FINETUNED:
        return (
            "None for this hospital’s patients, on whom it was trained further without noise: it "
            "must not leave the hospital."
        )
    if candidate.private is False:
        return "NOT PRIVATE: its noise came from a seed and can be taken away again."
    if candidate.private is None:
        return "No guarantee: a model may reveal what it has memorised of training images."
    if plan is None or plan.private is None:
        return "It keeps the guarantee of its plan, which was not at hand for this page."
    return f"{in_one_line(plan)} {not_covered(plan)}"


def kind(candidate: Candidate) -> str:
    """What a candidate is, in words."""
    return KINDS.get(candidate.name.split(" ")[0], f"a model of the kind “{candidate.arm}”")


def plainly(reason: str) -> str:
    """A reason with thresholds called as the page calls them, as a sentence."""
    for name, words in THRESHOLDS.items():
        reason = re.sub(rf"\b{name} \(([^)]*)\)", rf"“{words} \1”", reason)
    return reason[:1].upper() + reason[1:]


def leading(result: ValidationResult) -> list[str]:
    """The reasons that say more than the table of thresholds, as many as the first page holds."""
    names = tuple(f"{name} (" for name in THRESHOLDS)
    met = [r for r in result.verdict.reasons if r.startswith(names) and " is met: " in r]
    return [plainly(r) for r in result.verdict.reasons if r not in met][:MOST_REASONS]


def _amount(threshold: str, value: float | None) -> str:
    """A threshold's number with its unit."""
    if value is None:
        return "–"
    if threshold == "patients_at_least":
        return f"{value:g}"
    if threshold == "failures_share_at_most":
        return f"{findings.number(100 * value, 1)} %"
    if threshold == "volume_bias_percent_at_most":
        return f"{findings.number(value, 1)} %"
    if threshold == "hd95_mm_at_most":
        return f"{findings.number(value, 2)} mm"
    return findings.number(value)
