"""What follows from the patients of a hospital together: every number with how sure it is.

Patients are the unit: every mean, interval and test is over patients. Units and undefined values
are those of `fedseg.evaluation.observations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedseg.evaluation.observations import Detection, FailureKind
from fedseg.frozen import Count, Finite, Fraction, Frozen, Natural, NotNegative

Measure = Literal["dice", "hd95_mm", "nsd", "volume_error_percent"]
Outcome = Literal["better", "not worse", "worse", "undecided"]


class Estimate(Frozen):
    """A mean over patients with its 95 % interval; None where it cannot be told.

    Attributes:
        patients: over how many; below six of them there is no interval.
    """

    patients: Natural
    mean: Finite | None
    low: Finite | None
    high: Finite | None


class LabelSummary(Frozen):
    """One label under one candidate, over patients.

    Attributes:
        sensitivity: lesions found, as a share of the patient's lesions, mean over patients.
        precision: predicted lesions that are right, as a share, mean over patients.
        false_lesions: false ones in a patient, mean.
        lesions: all patients together.
    """

    dice: Estimate
    hd95_mm: Estimate
    nsd: Estimate
    volume_error_ml: Estimate
    sensitivity: Estimate | None = None
    precision: Estimate | None = None
    false_lesions: Estimate | None = None
    lesions: Detection | None = None


class Summary(Frozen):
    """One candidate over all patients.

    Attributes:
        worst_patient: who has the lowest Dice; ties go by name.
        failed: patients with at least one failure.
        failures: how many of each kind, over patients and labels.
        failed_share: observed, with its 95 % interval (Clopper-Pearson).
        seconds: of one case, median over patients.
    """

    candidate: str
    patients: Natural
    dice: Estimate
    hd95_mm: Estimate
    nsd: Estimate
    worst_dice: Finite | None
    worst_patient: str | None
    failed: Natural
    failures: Mapping[FailureKind, Natural]
    failed_share: Estimate
    seconds: NotNegative
    labels: Mapping[str, LabelSummary]


class Comparison(Frozen):
    """Two candidates on the same patients: `a` less `b`.

    Attributes:
        difference: mean paired difference with its bootstrap interval.
        a_higher: patients in whom `a` is higher; ties count for neither.
        unpaired: patients left out because the measure is undefined under one of the two.
        standardised: mean difference over its standard deviation (Cohen's d of pairs).
        p: two-sided, by flipping the signs of the differences; None below six patients.
        p_adjusted: by Holm over the comparisons of the same family.
        outcome: for Dice alone: what may be said of `a` against `b`.
    """

    a: str
    b: str
    measure: Measure
    difference: Estimate
    a_higher: Natural
    b_higher: Natural
    unpaired: Natural
    standardised: Finite | None
    p: Fraction | None
    p_adjusted: Fraction | None
    outcome: Outcome | None


class Agreement(Frozen):
    """Bland-Altman analysis of a label's volume: predicted less true.

    Attributes:
        bias_ml: mean difference with its 95 % interval (t).
        bias_percent: of the mean true volume, with its interval; None without any volume.
        lower_limit_ml: of agreement: where 2.5 % of differences lie below, were they normal.
        upper_limit_ml: where 2.5 % lie above.
        limits_half_width_ml: of the 95 % intervals of the two limits.
        slope: of the difference on the mean of both volumes: a bias that grows with size.
    """

    candidate: str
    label: str
    patients: Natural
    bias_ml: Estimate
    bias_percent: Estimate
    lower_limit_ml: Finite | None
    upper_limit_ml: Finite | None
    limits_half_width_ml: NotNegative | None
    slope: Estimate


class ReliabilityBin(Frozen):
    """Voxels whose confidence (softmax of the predicted label) lies in (low, high].

    Attributes:
        share: of all foreground voxels.
        confidence: their mean; None where there are none.
        accuracy: the share whose label is right; None where there are none.
    """

    low: Fraction
    high: Fraction
    share: Fraction
    confidence: Fraction | None
    accuracy: Fraction | None


class Calibration(Frozen):
    """Whether a candidate's confidence is worth what it says, on foreground voxels.

    Attributes:
        error: expected calibration error, mean over patients.
        bins: share, confidence and accuracy by patient first, then the mean over patients.
        overconfident: mean confidence less mean accuracy, mean over patients.
    """

    candidate: str
    error: Estimate
    overconfident: Estimate
    bins: tuple[ReliabilityBin, ...]


class Subgroup(Frozen):
    """The patients who share a value; suppressed where they are fewer than `suppress_below`.

    Attributes:
        by: the column of the manifest.
        value: of the column; "unknown" where it is empty.
        patients: how many; None where suppressed.
        dice: candidate -> Dice; empty where suppressed.
        failed: candidate -> patients with a failure; empty where suppressed.
    """

    by: str
    value: str
    suppressed: bool
    patients: Count | None
    dice: Mapping[str, Estimate] = {}
    failed: Mapping[str, Natural] = {}
