"""What models are worth on one hospital's held-back patients: validation.json.

Every number is about this hospital's own patients and stays there: what was measured of each
patient, what follows from all of them, and the verdict by the hospital's own thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from fedseg.evaluation.evidence import Agreement, Calibration, Comparison, Subgroup, Summary
from fedseg.evaluation.observations import PatientValidation
from fedseg.evaluation.thresholds import Thresholds
from fedseg.frozen import Count, Digest, Finite, Frozen, Natural, Positive

Split = Literal["val", "test"]
Decision = Literal["go", "no-go", "undecided"]
Met = Literal["met", "broken", "undecided"]


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
        left_out: how many of what was not measured, as `cases without a label`.
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
