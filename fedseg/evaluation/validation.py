"""What models are worth on one hospital's held-back patients: validation.json.

Every number is about this hospital's own patients and stays there. Patients are the unit: a
patient's cases are averaged first, and every mean, interval and test is over patients. A value is
None where it is undefined: see `fedseg.evaluation.metrics` for what empty masks give. Dice and
surface Dice are in [0, 1], lengths in mm, volumes in ml, times in seconds of this machine, which
are the only numbers that do not repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedseg.evaluation.thresholds import Thresholds
from fedseg.frozen import Count, Digest, Fraction, Frozen, NotNegative, Positive

Split = Literal["val", "test"]
Measure = Literal["dice", "hd95_mm", "nsd", "volume_error_percent"]
FailureKind = Literal["empty", "invented", "volume", "far"]
Outcome = Literal["better", "not worse", "worse", "undecided"]
Decision = Literal["go", "no-go", "undecided"]
Met = Literal["met", "broken", "undecided"]
Natural = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Candidate(Frozen):
    """A model that is compared.

    Attributes:
        name: "global", "own", "finetuned", "local", "pooled" or "initial", by how it was trained;
            with the file's stem in brackets where two would have the same one.
        file: the file's name, without its folder.
        arm: as the model file says it.
        rounds: of federated training, as the model file says.
        released: digest of the shared model that this one was made from.
        private: whether it keeps its plan's guarantee; None where there is none.
        trained_on: in words.
    """

    name: str
    file: str
    model_digest: Digest
    plan_digest: Digest
    study: str
    arm: str
    rounds: Natural
    released: Digest | None = None
    private: bool | None = None
    trained_on: str


class Detection(Frozen):
    """Lesions of one patient, or of all, found by overlap.

    Attributes:
        lesions: in the truth.
        found: of these, how many the prediction touches enough.
        predicted: lesions in the prediction.
        right: of these, how many the truth touches enough.
    """

    lesions: Natural
    found: Natural
    predicted: Natural
    right: Natural

    @property
    def missed(self) -> int:
        """Lesions that were not found."""
        return self.lesions - self.found

    @property
    def false(self) -> int:
        """Predicted lesions where there is none."""
        return self.predicted - self.right


class Failure(Frozen):
    """A prediction that nobody would use, and why, for one label."""

    label: str
    kind: FailureKind
    reason: str


class LabelScores(Frozen):
    """One label of one patient; volumes are means over the patient's cases.

    Attributes:
        volume_ml: in the truth.
        predicted_ml: in the prediction.
        lesions: summed over the cases; None where the label is not lesions.
    """

    dice: Finite | None
    hd95_mm: Finite | None
    nsd: Finite | None
    volume_ml: NotNegative
    predicted_ml: NotNegative
    lesions: Detection | None = None

    @property
    def volume_error_ml(self) -> float:
        """Predicted less true volume."""
        return self.predicted_ml - self.volume_ml


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


class PatientValidation(Frozen):
    """One patient under one candidate.

    Attributes:
        candidate: its name.
        patient: as the hospital's own data call the patient.
        cases: how many were measured.
        labels: label -> scores; only labels that this hospital annotates.
        dice: mean over the labels, as `hd95_mm` and `nsd`.
        calibration_error: expected calibration error of the foreground; None without foreground.
        seconds: wall time of one case's inference, mean.
    """

    candidate: str
    patient: str
    cases: Count
    labels: Mapping[str, LabelScores]
    dice: Finite | None
    hd95_mm: Finite | None
    nsd: Finite | None
    calibration_error: Fraction | None
    failures: tuple[Failure, ...] = ()
    seconds: NotNegative

    @property
    def failed(self) -> bool:
        """Whether any label's prediction is empty or wild."""
        return bool(self.failures)


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


class Check(Frozen):
    """One threshold held against one candidate.

    Attributes:
        threshold: its name in policy.yaml.
        asked: the hospital's number.
        found: the candidate's; None where it is undefined.
        words: what that means.
    """

    candidate: str
    threshold: str
    asked: Finite
    found: Finite | None
    met: Met
    words: str


class Verdict(Frozen):
    """What follows, by thresholds that were set beforehand.

    Attributes:
        decision: never "go" where no thresholds were set or too few patients were measured.
        recommended: the candidate's name; None where nothing can be said.
        established: whether the recommended one is shown to be not worse than every other; else it
            has the highest mean Dice of those that cannot be told apart.
        reasons: in plain words, the most important first.
        checks: every threshold of every candidate.
    """

    decision: Decision
    recommended: str | None
    established: bool
    reasons: tuple[str, ...]
    checks: tuple[Check, ...] = ()


class ValidationResult(Frozen):
    """All that `fedseg-site validate` found.

    Attributes:
        study: of the first candidate.
        plan_digest: of the first candidate.
        site: the hospital, as its folder or its data name it.
        created: ISO 8601, UTC.
        split: whose patients were measured.
        left_out: cases that could not be measured, by reason in words.
        labels: name -> value, those that this hospital annotates.
        lesion_labels: labels that are lesions.
        margin: a difference of Dice down to minus this one is "not worse".
        warnings: plain words, to be read before any number.
        thresholds: as set beforehand; None where the hospital set none.
    """

    format: Literal["fedseg-validation/1"] = "fedseg-validation/1"
    study: str
    plan_digest: Digest
    site: str
    created: str
    split: Split
    tolerance_mm: Positive
    margin: Positive
    suppress_below: Count
    labels: Mapping[str, Count]
    lesion_labels: tuple[str, ...]
    left_out: Mapping[str, Count] = {}
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    patients: tuple[PatientValidation, ...] = Field(min_length=1)
    summaries: tuple[Summary, ...]
    comparisons: tuple[Comparison, ...]
    agreement: tuple[Agreement, ...]
    calibration: tuple[Calibration, ...]
    subgroups: tuple[Subgroup, ...]
    warnings: tuple[str, ...]
    thresholds: Thresholds | None
    verdict: Verdict

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [candidate.name for candidate in self.candidates]
        parts = (self.patients, self.summaries, self.agreement, self.calibration)
        named = {part.candidate for some in parts for part in some}
        if len(set(names)) != len(names) or not named <= set(names):
            raise ValueError("candidates must have different names, and nothing name another one")
        return self

    def candidate(self, name: str) -> Candidate:
        """The candidate of a name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def summary(self, name: str) -> Summary:
        """A candidate's summary."""
        return next(summary for summary in self.summaries if summary.candidate == name)

    def patients_of(self, name: str) -> tuple[PatientValidation, ...]:
        """A candidate's patients, the lowest Dice first; undefined ones last, ties by name."""
        own = [patient for patient in self.patients if patient.candidate == name]
        return tuple(sorted(own, key=lambda p: (p.dice is None, p.dice or 0.0, p.patient)))
