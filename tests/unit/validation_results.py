"""Validations that nobody ran: plausible ones, for the tests of what reads them."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, median
from typing import Any

import numpy as np
from study_results import make_overlay, make_plan

from fedseg.evaluation.evidence import (
    Agreement,
    Calibration,
    Comparison,
    Estimate,
    LabelSummary,
    ReliabilityBin,
    Subgroup,
    Summary,
)
from fedseg.evaluation.observations import Detection, Failure, LabelScores, PatientValidation
from fedseg.evaluation.statistics import mean_with_interval
from fedseg.evaluation.thresholds import Thresholds
from fedseg.evaluation.validation import Candidate, Check, ValidationResult, Verdict
from fedseg.reports.figures import Overlay

LABELS = {"anterior": 1, "posterior": 2}
LEVELS = {"finetuned": 0.87, "global": 0.86, "local": 0.80}
THRESHOLDS = Thresholds(
    dice_at_least=0.8,
    worst_case_dice_at_least=0.5,
    failures_share_at_most=0.1,
    volume_bias_percent_at_most=10.0,
    patients_at_least=10,
)


def estimate(values: list[float]) -> Estimate:
    if not values:
        return Estimate(patients=0, mean=None, low=None, high=None)
    mean, low, high = mean_with_interval(values)
    return Estimate(patients=len(values), mean=mean, low=low, high=high)


def make_candidates(names: tuple[str, ...]) -> tuple[Candidate, ...]:
    plan = make_plan()
    return tuple(
        Candidate(
            name=name,
            file=f"{name}.safetensors",
            model_digest=f"{place:x}" * 64,
            plan_digest=plan.digest,
            study=plan.study,
            arm={"global": "federated"}.get(name, name),
            rounds=0 if name == "local" else 20,
            released="a" * 64 if name == "finetuned" else None,
            trained_on={
                "finetuned": "patients of every hospital of the study, then of this one alone",
                "global": "patients of every hospital of the study",
            }.get(name, "patients of this hospital alone"),
        )
        for place, name in enumerate(names, start=1)
    )


def make_patients(name: str, count: int, wild: tuple[int, ...]) -> tuple[PatientValidation, ...]:
    rng, hard = np.random.default_rng(len(name)), np.random.default_rng(5).gamma(2, 0.02, count)
    found = []
    for index in range(count):
        dice = float(
            np.clip(LEVELS.get(name, 0.7) + 0.04 - hard[index] + rng.normal(0, 0.01), 0, 1)
        )
        dice = 0.12 if index in wild else dice
        labels = {
            label: LabelScores(
                dice=dice,
                hd95_mm=9 * (1 - dice) + 0.4,
                nsd=min(1.0, dice + 0.08),
                volume_ml=1.5 + 0.1 * index,
                predicted_ml=(1.5 + 0.1 * index) * (1 + float(rng.normal(0.02, 0.04))),
            )
            for label in LABELS
        }
        failure = Failure(label="anterior", kind="far", reason="its centre is 31 mm off")
        found.append(
            PatientValidation(
                candidate=name,
                patient=f"P{index:03d}",
                cases=1,
                labels=labels,
                dice=dice,
                hd95_mm=9 * (1 - dice) + 0.4,
                nsd=min(1.0, dice + 0.08),
                calibration_error=0.04,
                failures=(failure,) if index in wild else (),
                seconds=1.4,
            )
        )
    return tuple(found)


def summarised(name: str, own: tuple[PatientValidation, ...]) -> Summary:
    worst = min(own, key=lambda p: p.dice or 0.0)
    failed = sum(p.failed for p in own)
    return Summary(
        candidate=name,
        patients=len(own),
        dice=estimate([p.dice for p in own if p.dice is not None]),
        hd95_mm=estimate([p.hd95_mm for p in own if p.hd95_mm is not None]),
        nsd=estimate([p.nsd for p in own if p.nsd is not None]),
        worst_dice=worst.dice,
        worst_patient=worst.patient,
        failed=failed,
        failures={"far": failed} if failed else {},
        failed_share=Estimate(patients=len(own), mean=failed / len(own), low=0.0, high=0.22),
        seconds=median(p.seconds for p in own),
        labels={
            label: LabelSummary(
                dice=estimate([s.dice for p in own if (s := p.labels[label]).dice is not None]),
                hd95_mm=estimate(
                    [s.hd95_mm for p in own if (s := p.labels[label]).hd95_mm is not None]
                ),
                nsd=estimate([s.nsd for p in own if (s := p.labels[label]).nsd is not None]),
                volume_error_ml=estimate([p.labels[label].volume_error_ml for p in own]),
                sensitivity=estimate([0.8, 0.9, 1.0]),
                false_lesions=estimate([0.0, 1.0, 0.0]),
                lesions=Detection(lesions=20, found=17, predicted=22, right=17),
            )
            for label in LABELS
        },
    )


def compared(a: tuple[PatientValidation, ...], b: tuple[PatientValidation, ...]) -> Comparison:
    pairs = [(x.dice or 0.0) - (y.dice or 0.0) for x, y in zip(a, b, strict=True)]
    found = estimate(pairs)
    assert found.low is not None
    return Comparison(
        a=a[0].candidate,
        b=b[0].candidate,
        measure="dice",
        difference=found,
        a_higher=sum(d > 0 for d in pairs),
        b_higher=sum(d < 0 for d in pairs),
        unpaired=0,
        standardised=0.7,
        p=0.01,
        p_adjusted=0.03,
        outcome="better" if found.low > 0 else "not worse" if found.low > -0.005 else "undecided",
    )


def agreed(name: str, own: tuple[PatientValidation, ...], label: str) -> Agreement:
    errors = [p.labels[label].volume_error_ml for p in own]
    spread = 1.96 * float(np.std(errors, ddof=1))
    return Agreement(
        candidate=name,
        label=label,
        patients=len(own),
        bias_ml=estimate(errors),
        bias_percent=estimate([100 * e / 2.0 for e in errors]),
        lower_limit_ml=fmean(errors) - spread,
        upper_limit_ml=fmean(errors) + spread,
        limits_half_width_ml=spread / 4,
        slope=Estimate(patients=len(own), mean=0.01, low=-0.02, high=0.04),
    )


def calibrated(name: str) -> Calibration:
    edges = np.linspace(0, 1, 11)
    return Calibration(
        candidate=name,
        error=estimate([0.03, 0.05, 0.04]),
        overconfident=estimate([0.02, 0.03, 0.04]),
        bins=tuple(
            ReliabilityBin(
                low=low,
                high=high,
                share=0.55 if high > 0.99 else 0.05,
                confidence=None if high < 0.35 else (low + high) / 2,
                accuracy=None if high < 0.35 else max(0.0, (low + high) / 2 - 0.06),
            )
            for low, high in pairwise(edges)
        ),
    )


def make_checks(summaries: tuple[Summary, ...], broken: tuple[str, ...] = ()) -> tuple[Check, ...]:
    checks = []
    for own in summaries:
        values = {
            "dice_at_least": (0.8, own.dice.mean),
            "worst_case_dice_at_least": (0.5, own.worst_dice),
            "failures_share_at_most": (0.1, own.failed_share.mean),
            "volume_bias_percent_at_most": (10.0, 3.1),
            "patients_at_least": (10.0, float(own.patients)),
        }
        for name, (asked, found) in values.items():
            met: Any = "broken" if name in broken else "met"
            checks.append(
                Check(
                    candidate=own.candidate,
                    threshold=name,
                    asked=asked,
                    found=found,
                    met=met,
                    words="of the label anterior" if name.startswith("volume") else "",
                )
            )
    return tuple(checks)


def make_validation(
    *,
    names: tuple[str, ...] = ("finetuned", "global", "local"),
    count: int = 16,
    wild: tuple[int, ...] = (),
    broken: tuple[str, ...] = (),
    lesions: bool = False,
    thresholds: Thresholds | None = THRESHOLDS,
    **changes: Any,
) -> ValidationResult:
    """A go, or a no-go where thresholds are said to be broken."""
    own = {name: make_patients(name, count, wild) for name in names}
    summaries = tuple(summarised(name, patients) for name, patients in own.items())
    checks = make_checks(summaries, broken) if thresholds else ()
    decided = "no-go" if broken else "go" if thresholds else "undecided"
    values: dict[str, Any] = {
        "study": make_plan().study,
        "plan_digest": make_plan().digest,
        "site": "st_mary",
        "created": "2026-02-03T10:20:30+00:00",
        "split": "test",
        "tolerance_mm": 1.0,
        "margin": 0.005,
        "suppress_below": 5,
        "labels": LABELS,
        "lesion_labels": ("anterior",) if lesions else (),
        "left_out": {"patients of all splits who withdrew": 3},
        "candidates": make_candidates(names),
        "patients": tuple(p for patients in own.values() for p in patients),
        "summaries": summaries,
        "comparisons": tuple(compared(own[names[0]], own[n]) for n in names[1:]),
        "agreement": tuple(agreed(n, own[n], label) for n in names for label in LABELS),
        "calibration": tuple(calibrated(n) for n in names),
        "subgroups": (
            Subgroup(
                by="scanner",
                value="3T",
                suppressed=False,
                patients=13,
                dice={n: s.dice for n, s in zip(names, summaries, strict=True)},
                failed=dict.fromkeys(names, 0),
            ),
            Subgroup(by="scanner", value="1.5T", suppressed=True, patients=None),
        ),
        "warnings": (
            f"{count} patients are few: an interval from so few is often too narrow",
            "No patient is older than 70, so nothing is known about such patients",
        ),
        "thresholds": thresholds,
        "verdict": Verdict(
            decision=decided,
            recommended=names[0],
            established=False,
            reasons=(
                f"{names[0]} has the highest mean Dice of the models that cannot be told apart.",
                "Against the model of this hospital alone it is better.",
            ),
            checks=checks,
        ),
    }
    return ValidationResult(**(values | changes))


def make_pictures(patients: tuple[str, ...], site: str = "st_mary") -> tuple[Overlay, ...]:
    return tuple(
        make_overlay(site, patient, "worst", error=9.0 - 1.2 * place, seed=place)
        for place, patient in enumerate(patients)
    )
