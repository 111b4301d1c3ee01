"""A model card for every released model, as Markdown and JSON (Mitchell et al., FAccT 2019).

Only what a plan and a study's history hold is on it; what nobody told is said not to be told. The
worst hospital comes before the mean. Nothing here reads a patient, a path or a key: the coordinator
writes the same card as a simulation, and a hospital one with what it knows of a released model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from math import prod
from typing import Literal

from fedseg.frozen import Digest, Frozen
from fedseg.measures import Metric
from fedseg.modelfile import ModelHeader
from fedseg.plan import StudyPlan
from fedseg.privacy.words import guessed_right, in_one_line, not_covered
from fedseg.reports import ownmodels
from fedseg.reports.crosssite import CrossSite, Spread, across, sentences
from fedseg.result import GuaranteeRecord, SiteAnswer, StageRecord, StudyResult
from fedseg.task import Channel

Writer = Literal["coordinator", "simulation", "hospital"]
Standing = Literal["kept", "not private", "none"]
NO_LICENCE = "Licence: not told by the plan."
MODEL = "model.safetensors"


class TrainingSite(Frozen):
    """One hospital that answered; numbers of patients are None where they were withheld."""

    site: str
    patients: int | None
    rounds: int


class MeasuredSite(Frozen):
    """The released model at one hospital: metric -> mean, and Dice by label, where they left."""

    site: str
    standing: Literal["measured", "withheld", "absent"]
    patients: int | None
    means: dict[Metric, float]
    dice: dict[str, float | None]


class ModelCard(Frozen):
    """What is known of a released model; the whole plan is in the model's file.

    Attributes:
        writer: who wrote the card, and so what could be known.
        file: of the model, beside the card.
        arm: how it was trained.
        rounds: closed ones.
        released: the shared model that a hospital's own one was made from.
        stays: the model holds what one hospital made of its patients and must not leave it.
        parameters: numbers in the model; None where the plan was not built.
        standing: whether its plan's guarantee holds for it.
        guarantee: in words, with what it does not cover.
        training: None where the writer is not told who took part.
        measured_after: the round whose model was measured; None where none was.
        measured: worst first; empty where the writer is told no number.
        findings: what the numbers say, worst hospital first.
        caveats: what is to be known before use.
        missing: what nobody told.
    """

    format: Literal["fedseg-model-card/1"] = "fedseg-model-card/1"
    writer: Writer
    fedseg: str
    study: str
    file: str
    plan: Digest
    model: Digest
    arm: str
    rounds: int
    released: Digest | None = None
    stays: bool = False
    network: str
    network_version: str
    parameters: int | None
    strategy: str
    steps_per_round: int
    minimum_sites: int
    initial: Digest | None
    dimensions: int
    spacing_mm: tuple[float, ...]
    channels: tuple[Channel, ...]
    labels: dict[str, int]
    metrics: tuple[Metric, ...]
    tolerance_mm: float
    standing: Standing
    guarantee: tuple[str, ...]
    training: tuple[TrainingSite, ...] | None
    measured_after: int | None = None
    measured: tuple[MeasuredSite, ...] = ()
    spread: tuple[Spread, ...] = ()
    findings: tuple[str, ...]
    caveats: tuple[str, ...]
    missing: tuple[str, ...]

    def to_json(self) -> str:
        """Two spaces, sorted keys, a newline at the end."""
        value = self.model_dump(mode="json")
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def card_of_history(
    plan: StudyPlan,
    stages: Sequence[StageRecord],
    model: str,
    *,
    sites: Sequence[str] = (),
    simulated: bool = False,
    guarantee: GuaranteeRecord | None = None,
    caveats: Sequence[str] = (),
    file: str = MODEL,
) -> ModelCard:
    """The card of a study's shared model, by what its coordinator knows.

    Args:
        stages: the study's history.
        model: digest of the released model.
        sites: who is enrolled besides those who answered.
        simulated: the hospitals were simulated on one computer.
        guarantee: what was kept and spent, where that was counted.
        caveats: besides those that follow from the plan.
        file: name of the model's file.
    """
    found, own = across(plan, stages, sites), ownmodels.own_models(plan, stages, sites)
    seeded = guarantee is not None and not guarantee.private
    standing: Standing = "none" if plan.private is None else "not private" if seeded else "kept"
    told = _training(stages, sites)
    missing = [*_never_told(), *_withheld(told, found)]
    return _card(
        plan,
        model,
        writer="simulation" if simulated else "coordinator",
        file=file,
        arm="federated",
        rounds=max((r.round for r in stages if r.stage == "train"), default=0),
        standing=standing,
        guarantee=_guarantee(plan, standing, guarantee),
        training=told,
        measured_after=found.round,
        measured=_measured(found, stages),
        spread=found.spread,
        findings=(*sentences(found), *ownmodels.sentences(plan, own)),
        caveats=(*caveats, *_caveats(plan, simulated=simulated)),
        missing=tuple(missing),
    )


def card_of_result(result: StudyResult) -> ModelCard:
    """The card of a simulated study's shared model: by what a coordinator would know of it."""
    faults = [f"A fault was caused on purpose: {fault}." for fault in result.rehearsed_faults]
    return card_of_history(
        result.plan,
        result.stages,
        result.model_digest,
        sites=[site.name for site in result.sites],
        simulated=True,
        guarantee=result.guarantee,
        caveats=faults,
    )


def card_of_model(header: ModelHeader, file: str = MODEL) -> ModelCard:
    """The card that a hospital writes beside a released model: its file tells no hospital's name.

    Its own validation is not on it: that stays in validations/.
    """
    plan = header.plan
    standing: Standing = "none" if plan.private is None else "kept"
    if header.private is False:
        standing = "not private"
    stays = ("It holds parts that were trained on this hospital’s patients alone: keep it here.",)
    return _card(
        plan,
        header.model_digest,
        writer="hospital",
        file=file,
        arm=header.arm,
        rounds=header.rounds,
        released=header.released,
        stays=header.stays,
        standing=standing,
        guarantee=_guarantee(plan, standing, None),
        training=None,
        findings=(
            "Not told to a hospital: how the model does elsewhere. How it does here says "
            "`fedseg-site validate`.",
        ),
        caveats=(*(stays if header.stays else ()), *_caveats(plan, simulated=False)),
        missing=(
            *_never_told(),
            "Which hospitals took part, with how many patients, and how the model does there.",
        ),
    )


def _card(plan: StudyPlan, model: str, **told: object) -> ModelCard:
    """A card with the plan's facts filled in."""
    tensors = plan.initial.tensors if plan.initial else ()
    facts: dict[str, object] = {
        "fedseg": version("fedseg"),
        "study": plan.study,
        "plan": plan.digest,
        "model": model,
        "network": plan.model.network,
        "network_version": plan.model.version,
        "parameters": sum(prod(spec.shape) for spec in tensors) if tensors else None,
        "strategy": plan.aggregation.title,
        "steps_per_round": plan.training.steps_per_round,
        "minimum_sites": plan.aggregation.minimum_sites,
        "initial": plan.initial.digest if plan.initial else None,
        "dimensions": plan.task.dimensions,
        "spacing_mm": plan.task.spacing_mm,
        "channels": plan.task.channels,
        "labels": dict(plan.task.labels),
        "metrics": plan.evaluation.metrics,
        "tolerance_mm": plan.evaluation.tolerance_mm,
    }
    return ModelCard.model_validate(facts | told)


def _training(stages: Sequence[StageRecord], sites: Sequence[str]) -> tuple[TrainingSite, ...]:
    """Who trained, with how many patients as last told, in how many rounds."""
    answers: dict[str, list[SiteAnswer]] = {site: [] for site in sorted(sites)}
    counts: dict[str, int | None] = {}
    for record in stages:
        for answer in record.answers if record.stage in ("enlist", "train") else ():
            answers.setdefault(answer.site, [])
            counts[answer.site] = answer.patients
            if record.stage == "train":
                answers[answer.site].append(answer)
    return tuple(
        TrainingSite(site=site, patients=counts.get(site), rounds=len(own))
        for site, own in sorted(answers.items())
    )


def _measured(found: CrossSite, stages: Sequence[StageRecord]) -> tuple[MeasuredSite, ...]:
    """Every hospital's numbers in the last measuring, worst first."""
    last = next((r for r in reversed(stages) if r.stage == "evaluate"), None)
    labels = {a.site: a.scores.get("dice", {}) for a in last.answers} if last else {}
    return tuple(
        MeasuredSite(
            site=score.site,
            standing=score.standing,
            patients=score.patients,
            means=score.values,
            dice=labels.get(score.site, {}),
        )
        for score in found.scores
    )


def _guarantee(
    plan: StudyPlan, standing: Standing, record: GuaranteeRecord | None
) -> tuple[str, ...]:
    """What patients were guaranteed, in sentences."""
    if standing == "none":
        return (f"NO GUARANTEE: {in_one_line(plan).removeprefix('None: ')}",)
    if standing == "not private" and record is not None:
        return (
            "NOT PRIVATE: the noise of this study came from a seed, so that it can be taken away "
            "again. The model must not be used as a private one.",
        )
    if standing == "not private":
        return (
            "NOT PRIVATE: this model’s file says that it does not keep its plan’s guarantee, "
            "because its noise was seeded or because it was trained further without any.",
        )
    assert plan.private is not None
    spent = (
        (f"Spent: epsilon {record.epsilon_spent:g} at delta {record.delta:g}.",) if record else ()
    )
    return (
        in_one_line(plan),
        "In words: somebody who knows everything else and sees every update and model tells "
        "rightly whether a certain patient was trained on in at most "
        f"{100 * guessed_right(plan.private):.1f} of 100 cases; blind guessing is right in 50.",
        not_covered(plan),
        *spent,
    )


def _never_told() -> tuple[str, ...]:
    """What no plan and no history holds."""
    return (
        "Intended users, and any approval as a medical device.",
        "Age, sex, ethnicity, disease and scanner of patients: no such field leaves a hospital.",
        NO_LICENCE,
    )


def _withheld(told: Sequence[TrainingSite], found: CrossSite) -> list[str]:
    """Whose numbers are not known."""
    missing = []
    if counts := [site.site for site in told if site.patients is None]:
        missing.append(f"Numbers of patients of {', '.join(counts)}.")
    if silent := [*found.named("withheld"), *found.named("absent")]:
        missing.append(f"How the model does at {', '.join(silent)}.")
    return missing


def _caveats(plan: StudyPlan, *, simulated: bool) -> tuple[str, ...]:
    """What the plan's own settings mean for whoever uses the model."""
    personal = {"norms": "norm parameters", "head": "last layer"}
    said = ["Research software: nothing here supports a clinical decision."]
    if simulated:
        said.append("All hospitals were simulated on one computer, in one run with one seed.")
    if plan.aggregation.personal:
        said.append(
            f"Each hospital has its own {personal[plan.aggregation.personal]}, which never leave "
            "it: elsewhere the model is used with those it started from, and its scores at these "
            "hospitals do not say how it does there."
        )
    said.append(
        "Validate it on your own patients before use (`fedseg-site validate`): scores at other "
        "hospitals do not carry over."
    )
    return tuple(said)
