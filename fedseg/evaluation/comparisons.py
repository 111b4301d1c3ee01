"""Two models on the same patients: paired differences, and what may be said of them.

Each patient is compared with themselves. The mean difference has a bootstrap interval; its p value
is that of the sign-flip test (Fisher 1935; exact up to 13 patients), which tests the same mean and
assumes only that without an effect a difference is as likely above zero as below by as much. p
values are adjusted by Holm (Scandinavian Journal of Statistics 1979) over the comparisons that are
made for the same purpose: Dice, which decides, by itself, and all other measures together.

A point is 0.01 Dice. "Not worse" means that the lower end of the interval is above minus half a
point. What is neither better, not worse nor worse is undecided: that is no proof of anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import fmean

import numpy as np
from scipy import stats

from fedseg.evaluation.estimates import FEWEST, estimate
from fedseg.evaluation.evidence import Comparison, Estimate, Measure, Outcome
from fedseg.evaluation.observations import LabelScores, PatientValidation

MARGIN = 0.005
SIGNIFICANT = 0.05
FLIPS = 9_999
DECISIVE: Measure = "dice"


def compare(patients: Mapping[str, Sequence[PatientValidation]]) -> tuple[Comparison, ...]:
    """Every pair of candidates by every measure, with p values adjusted by family.

    Args:
        patients: candidate -> its patients; pairs go in the order of the candidates, `a` first.
    """
    found = [
        _pair(a, b, patients[a], patients[b], measure)
        for measure in MEASURES
        for a, b in combinations(patients, 2)
    ]
    decisive = _adjusted([each for each in found if each.measure == DECISIVE])
    others = _adjusted([each for each in found if each.measure != DECISIVE])
    judged = [each.model_copy(update={"outcome": outcome_of(each)}) for each in decisive]
    return (*judged, *others)


def outcome_of(comparison: Comparison, *, margin: float = MARGIN) -> Outcome:
    """What may be said of `a` against `b`, for a measure of which more is better."""
    difference, p = comparison.difference, comparison.p_adjusted
    low, high = difference.low, difference.high
    if low is None or high is None:
        return "undecided"
    significant = p is not None and p < SIGNIFICANT
    if low > 0 and significant:
        return "better"
    if low > -margin:
        return "not worse"
    return "worse" if high < 0 and significant else "undecided"


def turned(comparison: Comparison) -> Comparison:
    """The same comparison seen from `b`."""
    seen = comparison.difference
    mean, low, high = seen.mean, seen.high, seen.low
    back = Estimate(patients=seen.patients, mean=_minus(mean), low=_minus(low), high=_minus(high))
    other = comparison.model_copy(
        update={
            "a": comparison.b,
            "b": comparison.a,
            "difference": back,
            "a_higher": comparison.b_higher,
            "b_higher": comparison.a_higher,
            "standardised": _minus(comparison.standardised),
        }
    )
    decided = comparison.measure == DECISIVE
    return other.model_copy(update={"outcome": outcome_of(other) if decided else None})


def sign_flip_p(differences: Sequence[float], *, seed: int = 0) -> float | None:
    """Two-sided p value of a mean of zero; None below two patients.

    Args:
        differences: one a patient, finite.
        seed: of the sampled flips, where there are too many to try all.
    """
    sample = np.asarray(differences, dtype=np.float64)
    if sample.size < 2:
        return None
    if not sample.any():
        return 1.0
    found = stats.permutation_test(
        (sample,),
        np.mean,
        permutation_type="samples",
        n_resamples=FLIPS,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return min(1.0, float(found.pvalue))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P values adjusted for how many there are; None stays None and does not count."""
    from statsmodels.stats.multitest import multipletests

    known = [p for p in p_values if p is not None]
    if not known:
        return list(p_values)
    adjusted = iter(multipletests(known, method="holm")[1])
    return [None if p is None else float(next(adjusted)) for p in p_values]


def volume_error_percent(patient: PatientValidation) -> float | None:
    """Mean over the labels that the truth has: volume error without its sign, in percent."""
    errors = [_percent(scores) for scores in patient.labels.values() if scores.volume_ml > 0]
    return fmean(errors) if errors else None


MEASURES: Mapping[Measure, Callable[[PatientValidation], float | None]] = {
    "dice": lambda patient: patient.dice,
    "hd95_mm": lambda patient: patient.hd95_mm,
    "nsd": lambda patient: patient.nsd,
    "volume_error_percent": volume_error_percent,
}


def _pair(
    a: str,
    b: str,
    of_a: Sequence[PatientValidation],
    of_b: Sequence[PatientValidation],
    measure: Measure,
) -> Comparison:
    """One comparison, not yet adjusted."""
    value = MEASURES[measure]
    second = {patient.patient: value(patient) for patient in of_b}
    pairs = [(value(patient), second[patient.patient]) for patient in of_a]
    differences = [x - y for x, y in pairs if x is not None and y is not None]
    one_known = sum((x is None) != (y is None) for x, y in pairs)
    spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    return Comparison(
        a=a,
        b=b,
        measure=measure,
        difference=estimate(differences),
        a_higher=sum(d > 0 for d in differences),
        b_higher=sum(d < 0 for d in differences),
        unpaired=one_known,
        standardised=fmean(differences) / spread if spread > 0 else None,
        p=sign_flip_p(differences) if len(differences) >= FEWEST else None,
        p_adjusted=None,
        outcome=None,
    )


def _adjusted(family: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one family with their adjusted p values."""
    adjusted = holm([each.p for each in family])
    return [
        each.model_copy(update={"p_adjusted": p}) for each, p in zip(family, adjusted, strict=True)
    ]


def _percent(scores: LabelScores) -> float:
    """Volume error of a label without its sign."""
    return 100 * abs(scores.volume_error_ml) / scores.volume_ml


def _minus(value: float | None) -> float | None:
    """The value's negative."""
    return None if value is None else -value
