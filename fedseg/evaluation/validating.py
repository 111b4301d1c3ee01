"""From measured patients to a validation: everything that follows from them, and its warnings.

Nothing here reads an image or a model: equal measurements give equal results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedseg.evaluation.calibration import Reliability, calibration
from fedseg.evaluation.comparisons import DECISIVE, MARGIN, compare
from fedseg.evaluation.estimates import FEWEST
from fedseg.evaluation.evidence import Comparison, Subgroup, Summary
from fedseg.evaluation.judging import judge
from fedseg.evaluation.observations import PatientValidation
from fedseg.evaluation.subgroups import subgroups
from fedseg.evaluation.summaries import agreements, summarise
from fedseg.evaluation.thresholds import Thresholds
from fedseg.evaluation.validation import Candidate, Split, ValidationResult

FEW = 20


@dataclass(frozen=True)
class Setting:
    """What was measured, beside the numbers.

    Attributes:
        site: the hospital.
        created: ISO 8601, UTC.
        labels: all of the task, name -> value.
        lesions: labels that are lesions.
        left_out: how many of what was not measured, as `cases without a label`.
        suppress_below: smaller subgroups are suppressed.
        traits: column -> patient -> cells of the manifest.
        thresholds: as set beforehand.
        notes: more warnings.
    """

    site: str
    created: str
    split: Split
    tolerance_mm: float
    labels: Mapping[str, int]
    suppress_below: int
    lesions: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    traits: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    thresholds: Thresholds | None = None
    notes: tuple[str, ...] = ()


def validated(
    candidates: Sequence[Candidate],
    patients: Mapping[str, Sequence[PatientValidation]],
    voxels: Mapping[str, Sequence[Reliability]],
    setting: Setting,
) -> ValidationResult:
    """The validation of these candidates.

    Args:
        candidates: at least one, of different names.
        patients: candidate -> its patients, at least one; the same ones for each.
        voxels: candidate -> the reliability of each patient.
    """
    patients = {candidate.name: patients[candidate.name] for candidate in candidates}
    summaries = tuple(summarise(name, own) for name, own in patients.items())
    comparisons = compare(patients)
    agreement = tuple(each for name, own in patients.items() for each in agreements(name, own))
    groups = subgroups(setting.traits, patients, setting.suppress_below)
    annotated = {label for own in patients.values() for p in own for label in p.labels}
    return ValidationResult(
        study=candidates[0].study,
        plan_digest=candidates[0].plan_digest,
        site=setting.site,
        created=setting.created,
        split=setting.split,
        tolerance_mm=setting.tolerance_mm,
        margin=MARGIN,
        suppress_below=setting.suppress_below,
        labels={name: value for name, value in setting.labels.items() if name in annotated},
        lesion_labels=setting.lesions,
        left_out=setting.left_out,
        candidates=tuple(candidates),
        patients=tuple(patient for own in patients.values() for patient in own),
        summaries=summaries,
        comparisons=comparisons,
        agreement=agreement,
        calibration=tuple(calibration(name, voxels[name]) for name in patients),
        subgroups=groups,
        warnings=tuple(_warnings(candidates, summaries, comparisons, groups, setting, annotated)),
        thresholds=setting.thresholds,
        verdict=judge(summaries, comparisons, agreement, setting.thresholds),
    )


def _warnings(
    candidates: Sequence[Candidate],
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    groups: Sequence[Subgroup],
    setting: Setting,
    annotated: set[str],
) -> Iterator[str]:
    """What has to be read before any number."""
    yield from setting.notes
    yield from _on_numbers(summaries, comparisons)
    yield from _on_split(candidates, setting)
    for each in comparisons:
        if each.measure == DECISIVE and each.unpaired:
            yield (
                f"{_patients(each.unpaired)} could not be compared between {each.a} and {each.b}: "
                "the Dice is undefined under one of the two, which rightly found nothing"
            )
    if setting.left_out:
        left_out = "; ".join(f"{count} {why}" for why, count in setting.left_out.items())
        yield f"not everybody who is held back was measured: {left_out}"
    missing = [name for name in setting.labels if name not in annotated]
    if missing:
        yield f"nothing is known of {', '.join(missing)}: this hospital does not annotate it"
    if any(group.suppressed for group in groups):
        yield (
            f"subgroups of fewer than {setting.suppress_below} patients are suppressed; the others "
            "are to be looked at, not concluded from"
        )


def _on_numbers(summaries: Sequence[Summary], comparisons: Sequence[Comparison]) -> Iterator[str]:
    """What so few patients cannot tell."""
    patients = max(summary.patients for summary in summaries)
    if patients < FEWEST:
        yield (
            f"only {_patients(patients)}: too few for any interval or test; look at each of them, "
            f"and hold back at least {FEWEST}"
        )
        return
    if patients < FEW:
        yield (
            f"only {patients} patients: differences between models that are small, and failures "
            "that are rare, cannot be seen"
        )
    for each in comparisons:
        low, high = each.difference.low, each.difference.high
        if each.outcome == "undecided" and low is not None and high is not None:
            yield (
                f"{each.a} against {each.b} is undecided: with {each.difference.patients} patients "
                f"the difference in Dice is known to {50 * (high - low):.1f} points either way"
            )
    for summary in summaries:
        if not summary.failed and summary.failed_share.high is not None:
            yield (
                f"no prediction of {summary.candidate} failed, which still allows for failures in "
                f"up to {summary.failed_share.high:.0%} of patients like these"
            )


def _on_split(candidates: Sequence[Candidate], setting: Setting) -> Iterator[str]:
    """What the measured patients may have been used for before."""
    if setting.split == "test":
        return
    yield (
        "no labelled test patient is left, so those of `val` were measured: the study looked at "
        "them while it ran, and whatever was chosen by them looks better than it is"
    )
    tuned = [candidate.name for candidate in candidates if candidate.arm == "finetuned"]
    if tuned:
        yield (
            f"{' and '.join(tuned)}: a model file does not say which patients told when to stop; "
            "`fedseg-site finetune` leaves `val` alone where there is no test patient, but if a "
            "test split was there when it ran, these patients chose the model"
        )


def _patients(count: int) -> str:
    """A number of patients in words."""
    return "1 patient" if count == 1 else f"{count} patients"
