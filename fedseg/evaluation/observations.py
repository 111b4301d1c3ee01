"""What one model did on one patient, as the hospital's own measurements say it.

A patient's cases are averaged first. A value is None where it is undefined: see
`fedseg.evaluation.metrics` for what empty masks give. Dice and surface Dice are in [0, 1], lengths
in mm, volumes in ml, times in seconds of this machine, which are the only numbers that do not
repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedseg.frozen import Count, Finite, Fraction, Frozen, Natural, NotNegative

FailureKind = Literal["empty", "invented", "volume", "far"]


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
