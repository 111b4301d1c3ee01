"""What a simulated study found: OUT/result.json.

Everything but the block `run` is a function of plan and data: equal studies give equal bytes,
whatever the engine, the order of the answers or the machine's speed. Private studies differ in
their noise, which nobody can repeat. The schema is published in docs/result.schema.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal, Self

from pydantic import ValidationError, model_validator

from fedseg.errors import DataError
from fedseg.frozen import Frozen
from fedseg.measures import Metric
from fedseg.plan import StudyPlan

Scores = dict[str, float | None]
ArmName = Literal["federated", "pooled", "local", "initial", "finetuned"]


def mean_of(scores: Mapping[str, float | None]) -> float | None:
    """Mean over the labels that have a value; None where no label has one."""
    known = [score for score in scores.values() if score is not None]
    return fmean(known) if known else None


class PatientScores(Frozen):
    """One patient's metrics by label name; a patient's cases are averaged first.

    A value is None where the metric is undefined: the label is neither in the truth nor in the
    prediction of any case, or the hospital does not annotate it. HD95 is in mm; NSD (surface
    Dice) and Dice are in [0, 1].
    """

    site: str
    patient: str
    cases: int
    dice: Scores
    hd95_mm: Scores = {}
    nsd: Scores = {}

    @property
    def mean_dice(self) -> float | None:
        """Mean over the foreground labels: the patient's Dice in every table of fedseg."""
        return mean_of(self.dice)

    def of(self, metric: Metric) -> Scores:
        """The values of one metric of the plan, by label name; empty where it was not measured."""
        return {"dice": self.dice, "hd95": self.hd95_mm, "nsd": self.nsd}[metric]


def mean_scores(patients: Sequence[PatientScores], metrics: Sequence[Metric]) -> dict[str, Scores]:
    """Metric -> label -> mean over the patients in which it is defined; None where in none."""
    found: dict[str, Scores] = {}
    for metric in metrics:
        per_patient = [patient.of(metric) for patient in patients]
        labels = sorted({label for scores in per_patient for label in scores})
        found[metric] = {
            label: mean_of({str(i): scores.get(label) for i, scores in enumerate(per_patient)})
            for label in labels
        }
    return found


def weighted_mean(pairs: Iterable[tuple[float | None, int | None]]) -> float | None:
    """Mean of the values there are, by patients; plain where these are not all counted."""
    known = [(value, patients) for value, patients in pairs if value is not None]
    weights = [patients for _, patients in known if patients is not None]
    if len(weights) < len(known) or not sum(weights):
        weights = [1] * len(known)
    if not known:
        return None
    return sum(v * w for (v, _), w in zip(known, weights, strict=True)) / sum(weights)


class SiteAnswer(Frozen):
    """What one site answered in one stage. `scores` is metric -> label -> mean over patients.

    `patients` is None where the site withholds how many they are. `head` is the blinded head of
    its ledger, where it keeps one. `labels` are those that it annotates, where it enlisted with
    some of the plan's alone.

    Attributes:
        update_norm: L2 norm of the update, in a training stage that was closed with it; so are the
            next four. They come from the update alone, which may be noised.
        update_agreement: median over the other sites of the cosine between the two updates,
            estimated to about 0.01.
        update_twin: a site whose update is the same but for its size.
        update_cosine: of the update and what the round came to; estimated so for means.
        update_distance: L2 distance of the two; None for means, which keep no update.
        own: digest of the site's own model, in the last round, where it let that model go.
    """

    site: str
    patients: int | None
    steps: int = 0
    loss: float | None = None
    scores: dict[str, Scores] = {}
    bytes_up: int
    head: str | None = None
    update_norm: float | None = None
    update_agreement: float | None = None
    update_twin: str | None = None
    update_cosine: float | None = None
    update_distance: float | None = None
    labels: tuple[str, ...] | None = None
    own: str | None = None

    @property
    def mean_dice(self) -> float | None:
        """Mean Dice over the labels, or None in a training stage."""
        return mean_of(self.scores.get("dice", {}))


class SiteFailure(Frozen):
    """A site that gave no usable answer: a coarse code, and what the coordinator saw."""

    site: str
    code: str
    reason: str


class StageRecord(Frozen):
    """One closed stage. Sites are sorted by name, not by the order of their answers.

    `owner` is the site whose own model was measured; None where it was the shared one, or none.
    """

    round: int
    stage: str
    attempt: int
    owner: str | None = None
    bytes_down: int
    bytes_up: int
    answers: tuple[SiteAnswer, ...]
    failures: tuple[SiteFailure, ...]


class SiteSummary(Frozen):
    """How much data a site brought, and how many cases were left out as unusable.

    `annotated` are the labels it trained with, where these are some of the plan's alone. A metric
    of another label is None at that hospital, except where its data know more than it trained
    with (labels withheld in a simulation).
    """

    name: str
    patients: dict[str, int]
    cases: dict[str, int]
    left_out: int = 0
    annotated: tuple[str, ...] | None = None


class Arm(Frozen):
    """One way to train, measured on the held-back patients of every hospital.

    A private study has the arm `initial` too, the model before any training: what the guarantee
    left of the gain is seen beside it. The arm `finetuned` is the federated model as each hospital
    trained it on for itself; the federated one again where a hospital gained nothing or could not.

    Attributes:
        models: digest of the model used at each hospital (`local` and `finetuned` have one a
            hospital).
        gradient_steps: steps of the optimiser, all hospitals together.
    """

    name: ArmName
    models: dict[str, str]
    gradient_steps: int
    patients: tuple[PatientScores, ...]

    def of_site(self, site: str) -> tuple[PatientScores, ...]:
        """The patients of one hospital."""
        return tuple(patient for patient in self.patients if patient.site == site)


class OwnModelScores(Frozen):
    """One hospital's own model, the last shared one with its last update, at every hospital.

    Attributes:
        site: whose model it is.
        model: its digest.
        scores: hospital that measured it -> metric -> mean over labels of its means over held-back
            patients, as its policy let them leave; empty where nothing left.
    """

    site: str
    model: str
    scores: dict[str, dict[Metric, float]]


class GuaranteeRecord(Frozen):
    """What a private study guaranteed to each patient of a hospital, and what it spent.

    Attributes:
        private: False where the noise was seeded: then nothing is guaranteed, whatever the numbers
            say, for who knows the seed takes the noise away again.
        epsilon: promised by the plan at `delta`, for training patients and for held-back ones.
        delta: likewise.
        epsilon_spent: by all rounds that were done, of each training patient; rounded up.
        epsilon_held_back: by metrics that left with noise, of each held-back patient; None where
            none leave so.
        noise_multiplier: standard deviation of a step's noise over the clip norm.
        text: unit, neighbours, steps, sampling, noise, what is covered and what is not.
    """

    private: bool
    epsilon: float
    delta: float
    epsilon_spent: float
    epsilon_held_back: float | None = None
    noise_multiplier: float
    text: str


class Run(Frozen):
    """What differs between equal studies: where and how fast it ran.

    Attributes:
        compute_s: CPU seconds of training by arm, all sites together.
        stage_s: wall seconds of each stage, in the order of `stages`; 0.0 where the study
            was killed before it could write them down.
    """

    engine: str
    started: str
    versions: dict[str, str]
    cores: int
    wall_s: float
    compute_s: dict[str, float]
    stage_s: tuple[float, ...]


class StudyResult(Frozen):
    """A whole simulated study. `guarantee` is None where the plan has none.

    `own_models` has those that were measured at every hospital, where the plan says so.
    """

    format: Literal["fedseg-result/1"] = "fedseg-result/1"
    plan: StudyPlan
    plan_digest: str
    model_digest: str
    split: str
    rehearsed_faults: tuple[str, ...] = ()
    sites: tuple[SiteSummary, ...]
    stages: tuple[StageRecord, ...]
    arms: tuple[Arm, ...]
    own_models: tuple[OwnModelScores, ...] = ()
    guarantee: GuaranteeRecord | None = None
    run: Run

    @model_validator(mode="after")
    def _says_its_guarantee(self) -> Self:
        if (self.guarantee is None) != (self.plan.private is None):
            raise ValueError("a private plan and a record of its guarantee belong together")
        return self

    def arm(self, name: ArmName) -> Arm | None:
        """One arm by name, or None where it was not trained."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def to_json(self) -> str:
        """The bytes of result.json: two spaces, sorted keys, a newline at the end."""
        value = self.model_dump(mode="json")
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def last_training(plan: StudyPlan, stages: Sequence[StageRecord]) -> StageRecord | None:
    """The training of the plan's last round that counts: an attempt that too few answered does not.

    None where it is still to come.
    """
    place, needed = (plan.aggregation.rounds, "train"), plan.aggregation.minimum_sites
    found = [r for r in stages if (r.round, r.stage) == place and len(r.answers) >= needed]
    return found[-1] if found else None


def stage_words(stage: str, owner: str | None) -> str:
    """A stage, and whose own model it is about if it is one's: `evaluate`, `own of hospital_b`."""
    return stage if owner is None else f"{stage} of {owner}"


def load_result(path: Path) -> StudyResult:
    """Read a result.json.

    Raises:
        DataError: the file cannot be read, or is no result of this version.
    """
    try:
        return StudyResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the result {path.name}: {error.strerror}") from None
    except ValidationError as error:
        raise DataError(f"{path.name} is not a fedseg result: {error.errors()[0]['msg']}") from None
