"""A hospital's acceptance report: may this model be used here, by thresholds set beforehand?

One page of verdict that a physician can read and sign, then every number behind it. The decision is
the result's and nothing else: a threshold that is broken is never outshone by a mean. The page is a
single file without a script that loads nothing; it shows patients and never leaves the hospital.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedseg.durable import write_atomically
from fedseg.evaluation.evidence import Measure
from fedseg.evaluation.observations import Failure, FailureKind, PatientValidation
from fedseg.evaluation.validation import Candidate, Check, Decision, Met, ValidationResult
from fedseg.modelfile import FINETUNED
from fedseg.plan import StudyPlan
from fedseg.privacy.words import in_one_line, not_covered
from fedseg.reports import acceptance_charts as charts
from fedseg.reports import findings
from fedseg.reports.figures import Overlay, label_colours, overlay_pictures
from fedseg.reports.page import data_uri, environment

ON_THE_FIRST_PAGE = 3
SHOWN = 6
MOST_REASONS, MOST_CHECKS = 2, 6
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


@dataclass(frozen=True)
class Case:
    """One patient to look at, with pictures as data URIs where there are some."""

    patient: PatientValidation
    plain: str | None
    outlined: str | None


def shown_candidate(result: ValidationResult) -> Candidate:
    """The candidate that the page shows in detail: the recommended one, else the first."""
    return result.candidate(result.verdict.recommended or result.candidates[0].name)


def patients_to_show(result: ValidationResult, most: int = SHOWN) -> tuple[str, ...]:
    """The patients of whom `write_acceptance` wants pictures, the worst first.

    They are those of `shown_candidate` with the lowest Dice; whoever has none comes last, but a
    failure without a Dice comes before good cases.
    """
    return tuple(p.patient for p in _worst_first(result)[:most])


def write_acceptance(
    result: ValidationResult,
    overlays: Sequence[Overlay],
    path: Path,
    *,
    plans: Mapping[str, StudyPlan] | None = None,
) -> None:
    """Write the page; an existing file is replaced in one step.

    Args:
        overlays: predictions of `shown_candidate` for `patients_to_show`; the page says of whom
            there is no picture.
        path: the file.
        plans: by digest, of the studies that the candidates come from: what they were trained on,
            and the guarantee in words.

    Raises:
        ValueError: the verdict says go although a threshold of the recommended model is broken, or
            recommends nothing.
        StorageError: it cannot be written; the page before it is untouched.
    """
    _require_one_story(result)
    page = environment().get_template("acceptance.html")
    write_atomically(path, page.render(_content(result, overlays, plans or {})).encode())


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


def _require_one_story(result: ValidationResult) -> None:
    """Refuse to print a go that the thresholds contradict."""
    verdict = result.verdict
    if verdict.decision != "go":
        return
    own = [check for check in verdict.checks if check.candidate == verdict.recommended]
    if not own or any(check.met != "met" for check in own):
        raise ValueError("a go needs thresholds, and every one of the recommended model to hold")


def _content(
    result: ValidationResult, overlays: Sequence[Overlay], plans: Mapping[str, StudyPlan]
) -> dict[str, Any]:
    """All that the template shows."""
    shown = shown_candidate(result)
    names = [candidate.name for candidate in result.candidates]
    return {
        "result": result,
        "shown": shown,
        "summary": result.summary(shown.name),
        "decision": DECISIONS[result.verdict.decision],
        "headline": headline(result),
        "title_of": {c.name: _kind(c) for c in result.candidates},
        "lines": {
            name: check_lines(c for c in result.verdict.checks if c.candidate == name)
            for name in names
        },
        "measured": len({patient.patient for patient in result.patients}),
        "cases": _cases(result, overlays),
        "first": ON_THE_FIRST_PAGE,
        "most_checks": MOST_CHECKS,
        "reasons": [_plainly(reason) for reason in result.verdict.reasons],
        "leading": _leading(result),
        "colours": charts.colours_of(result),
        "label_colours": label_colours(result.labels),
        "failures": _failures(result),
        "failure_words": FAILURES,
        "measures": MEASURES,
        "plans": plans,
        "privacy": {c.name: privacy_words(c, plans.get(c.plan_digest)) for c in result.candidates},
        "figures": _figures(result, shown),
        "subgroups": _by_column(result),
    }


def _plainly(reason: str) -> str:
    """A reason with thresholds called as the page calls them, as a sentence."""
    for name, words in THRESHOLDS.items():
        reason = re.sub(rf"\b{name} \(([^)]*)\)", rf"“{words} \1”", reason)
    return reason[:1].upper() + reason[1:]


def _leading(result: ValidationResult) -> list[str]:
    """The reasons that say more than the table of thresholds, as many as the first page holds."""
    names = tuple(f"{name} (" for name in THRESHOLDS)
    met = [r for r in result.verdict.reasons if r.startswith(names) and " is met: " in r]
    return [_plainly(r) for r in result.verdict.reasons if r not in met][:MOST_REASONS]


def _worst_first(result: ValidationResult) -> list[PatientValidation]:
    """Patients of the shown candidate, the worst first."""
    patients = result.patients_of(shown_candidate(result).name)
    return sorted(patients, key=lambda p: (_badness(p), p.patient))


def _badness(patient: PatientValidation) -> float:
    """Dice; a failure without one is as bad as none, and an undefined one is no bad case."""
    if patient.dice is not None:
        return patient.dice
    return 0.0 if patient.failed else 2.0


def _cases(result: ValidationResult, overlays: Sequence[Overlay]) -> list[Case]:
    """The worst patients with their pictures."""
    by_patient = {overlay.patient: overlay for overlay in overlays}
    found = []
    for patient in _worst_first(result)[:SHOWN]:
        overlay = by_patient.get(patient.patient)
        plain = outlined = None
        if overlay is not None:
            pictures = overlay_pictures(
                _annotated(overlay, result.labels.values()), result.labels, at_error=True
            )
            plain, outlined = (data_uri(picture, "jpeg") for picture in pictures)
        found.append(Case(patient, plain, outlined))
    return found


def _annotated(overlay: Overlay, values: Iterable[int]) -> Overlay:
    """Only labels that the hospital draws: where it draws none, no prediction is wrong."""
    known = list(values)
    truth, prediction = (
        np.where(np.isin(mask, known), mask, 0).astype(np.uint8)
        for mask in (overlay.truth, overlay.prediction)
    )
    return replace(overlay, truth=truth, prediction=prediction)


def _failures(result: ValidationResult) -> list[tuple[PatientValidation, Failure]]:
    """Every failure of every candidate, the shown candidate's first."""
    shown = shown_candidate(result).name
    ordered = sorted(result.patients, key=lambda p: (p.candidate != shown, p.candidate, p.patient))
    return [(patient, failure) for patient in ordered for failure in patient.failures]


def _figures(result: ValidationResult, shown: Candidate) -> dict[str, dict[str, str]]:
    """Charts as data URIs with what they show in words."""
    found = {"patients": _figure(charts.patients_chart(result), _patients_words(result))}
    dice = [c for c in result.comparisons if c.measure == "dice" and c.difference.mean is not None]
    if dice:
        words = "Paired differences of Dice with 95 % intervals: " + "; ".join(
            f"{c.a} less {c.b} {findings.number(c.difference.mean, signed=True)}" for c in dice
        )
        found["forest"] = _figure(charts.forest_chart(dice, result.margin), words + ".")
    volumes = [a for a in result.agreement if a.candidate == shown.name]
    if volumes:
        words = f"Predicted less true volume of every patient by “{shown.name}”; the bias is " + (
            ", ".join(
                f"{findings.number(a.bias_ml.mean, 2, True)} ml for {a.label}" for a in volumes
            )
        )
        svg = charts.volumes_chart(result, shown.name, volumes)
        found["volumes"] = _figure(svg, words + ".")
    if result.calibration:
        words = "Reliability diagram; expected calibration error: " + ", ".join(
            f"{findings.number(c.error.mean)} for {c.candidate}" for c in result.calibration
        )
        svg = charts.reliability_chart(result, result.calibration)
        found["reliability"] = _figure(svg, words + ".")
    return found


def _patients_words(result: ValidationResult) -> str:
    """What the chart of patients shows."""
    means = ", ".join(
        f"{findings.number(result.summary(c.name).dice.mean)} for {c.name}"
        for c in result.candidates
    )
    return f"Dice of every patient under every model, a line a patient; the means are {means}."


def _by_column(result: ValidationResult) -> dict[str, list[dict[str, Any]]]:
    """Subgroups by column of the manifest; of a suppressed one only that there is one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for group in result.subgroups:
        line: dict[str, Any] = {"value": group.value, "suppressed": group.suppressed}
        if not group.suppressed:
            line |= {"patients": group.patients, "dice": group.dice, "failed": group.failed}
        found.setdefault(group.by, []).append(line)
    return found


def _kind(candidate: Candidate) -> str:
    """What a candidate is, in words."""
    return KINDS.get(candidate.name.split(" ")[0], f"a model of the kind “{candidate.arm}”")


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


def _figure(svg: bytes, words: str) -> dict[str, str]:
    """A chart for the page."""
    return {"uri": data_uri(svg, "svg+xml"), "alt": words}
