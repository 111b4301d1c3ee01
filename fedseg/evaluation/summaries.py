"""One candidate over all patients: means with intervals, the worst patient, failures, lesions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from fedseg.evaluation.agreement import volume_agreement
from fedseg.evaluation.estimates import estimate, share
from fedseg.evaluation.evidence import Agreement, Estimate, LabelSummary, Summary
from fedseg.evaluation.lesions import precision, sensitivity, summed
from fedseg.evaluation.observations import FailureKind, LabelScores, PatientValidation


def summarise(candidate: str, patients: Sequence[PatientValidation]) -> Summary:
    """A candidate's summary.

    Args:
        patients: all of this candidate, at least one.
    """
    scored = [(p.dice, p.patient) for p in patients if p.dice is not None]
    worst_dice, worst_patient = min(scored, default=(None, None))
    failed = sum(patient.failed for patient in patients)
    kinds: Counter[FailureKind] = Counter(f.kind for p in patients for f in p.failures)
    return Summary(
        candidate=candidate,
        patients=len(patients),
        dice=estimate(p.dice for p in patients),
        hd95_mm=estimate(p.hd95_mm for p in patients),
        nsd=estimate(p.nsd for p in patients),
        worst_dice=worst_dice,
        worst_patient=worst_patient,
        failed=failed,
        failures=dict(sorted(kinds.items())),
        failed_share=share(failed, len(patients)),
        seconds=median(p.seconds for p in patients),
        labels={name: _of_label(own) for name, own in by_label(patients).items()},
    )


def agreements(candidate: str, patients: Sequence[PatientValidation]) -> tuple[Agreement, ...]:
    """Volumes of each label: predicted against true, over the patients annotated with it."""
    return tuple(
        volume_agreement(candidate, name, [s.volume_ml for s in own], [s.predicted_ml for s in own])
        for name, own in by_label(patients).items()
    )


def by_label(patients: Sequence[PatientValidation]) -> dict[str, list[LabelScores]]:
    """Label -> its scores, one for each patient annotated with it."""
    names = dict.fromkeys(name for patient in patients for name in patient.labels)
    return {name: [p.labels[name] for p in patients if name in p.labels] for name in names}


def _of_label(scores: Sequence[LabelScores]) -> LabelSummary:
    """One label over patients."""
    lesions = [each.lesions for each in scores if each.lesions is not None]
    return LabelSummary(
        dice=estimate(each.dice for each in scores),
        hd95_mm=estimate(each.hd95_mm for each in scores),
        nsd=estimate(each.nsd for each in scores),
        volume_error_ml=estimate(each.volume_error_ml for each in scores),
        sensitivity=_share_of(map(sensitivity, lesions)) if lesions else None,
        precision=_share_of(map(precision, lesions)) if lesions else None,
        false_lesions=estimate(float(each.false) for each in lesions) if lesions else None,
        lesions=summed(lesions) if lesions else None,
    )


def _share_of(values: Iterable[float | None]) -> Estimate:
    """Mean of patients' shares; where all are the same, resampling cannot say how sure it is."""
    found = estimate(values)
    if found.low != found.high:
        return found
    return found.model_copy(update={"low": None, "high": None})
