"""A hospital's acceptance report: may this model be used here, by thresholds set beforehand?

One page of verdict that a physician can read and sign, then every number behind it. The decision is
the result's and nothing else: a threshold that is broken is never outshone by a mean. The page is a
single file without a script that loads nothing; it shows patients and never leaves the hospital.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedseg.durable import write_atomically
from fedseg.evaluation.observations import Failure, PatientValidation
from fedseg.evaluation.validation import Candidate, ValidationResult
from fedseg.plan import StudyPlan
from fedseg.reports import acceptance_charts as charts
from fedseg.reports import findings
from fedseg.reports.acceptance_words import (
    DECISIONS,
    FAILURES,
    MEASURES,
    check_lines,
    headline,
    kind,
    leading,
    plainly,
    privacy_words,
)
from fedseg.reports.figures import Overlay, label_colours, overlay_pictures
from fedseg.reports.page import data_uri, environment

ON_THE_FIRST_PAGE = 3
SHOWN = 6
MOST_CHECKS = 6


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
        "title_of": {c.name: kind(c) for c in result.candidates},
        "lines": {
            name: check_lines(c for c in result.verdict.checks if c.candidate == name)
            for name in names
        },
        "measured": len({patient.patient for patient in result.patients}),
        "cases": _cases(result, overlays),
        "first": ON_THE_FIRST_PAGE,
        "most_checks": MOST_CHECKS,
        "reasons": [plainly(reason) for reason in result.verdict.reasons],
        "leading": leading(result),
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


def _figure(svg: bytes, words: str) -> dict[str, str]:
    """A chart for the page."""
    return {"uri": data_uri(svg, "svg+xml"), "alt": words}
