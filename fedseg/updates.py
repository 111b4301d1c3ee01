"""Tasks and answers: all that coordinator and sites say to each other.

A task is the same bytes for every site of a round; its identity is (study, plan, round, stage,
digest of the model it carries). An answer names the SHA-256 of the task it answers. What a site
says of its patients is in the fields of `Body` and nowhere else. Updates are deltas: trained model
minus the model of the task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat

from fedseg.arrays import Arrays, digest_of
from fedseg.container import pack, packed, peek, unpack
from fedseg.durable import Buffer
from fedseg.errors import TrustError
from fedseg.frozen import Digest, Frozen, Name, SiteName
from fedseg.plan import StudyPlan
from fedseg.promise import Openness
from fedseg.schema import TensorSpec
from fedseg.security.consent import Consent
from fedseg.security.identity import SignedRoll

StageName = Literal["enlist", "train", "evaluate", "own", "release"]
SplitName = Literal["train", "val", "test"]
RefusalCode = Literal["plan", "roster", "task", "data", "not_finite", "failed"]
NotNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]

# What a site says of a failure under a private plan, where more would tell of its data.
COARSER: Mapping[RefusalCode, RefusalCode] = {"data": "failed", "not_finite": "failed"}
HEADER_ROOM = 2 * 1024 * 1024  # a list of sites fits
TENSOR_ROOM = 1024
CONTROL = "control/"


class TaskHeader(Frozen):
    """What a task asks for.

    Attributes:
        model: digest of the tensors that travel with it.
        control: likewise, of the server's control variate, which scaffold's training brings.
        roll: who takes part, when sites enlist; None in a simulation and in every other stage.
        heads: the last blinded head of its ledger that each site's answers have carried. A site
            that does not know its own was put back to an older state, and refuses.
        consent: whose own model travels with the task, and that this hospital let it go; in the
            stage `own` alone.
    """

    format: Literal["fedseg-task/1"] = "fedseg-task/1"
    study: Name
    plan: Digest
    round: NotNegativeInt
    stage: StageName
    attempt: Annotated[int, Field(ge=1)]
    model: Digest | None
    control: Digest | None = None
    roll: SignedRoll | None = None
    heads: dict[SiteName, Digest] = {}
    consent: Consent | None = None

    @property
    def owner(self) -> str | None:
        """The site whose own model travels with the task; None where it is the shared one."""
        return None if self.consent is None else self.consent.site


class Enlisted(Frozen):
    """The site is ready: patients and cases by split, and cases left out as unusable.

    None is a number that the plan or the hospital withholds; so it is in every body.

    Attributes:
        labels: the plan's labels that the hospital declares to annotate, by their numbers. That is
            no count, and nothing about a single patient. None is all of them.
    """

    kind: Literal["enlist"] = "enlist"
    patients: dict[SplitName, NotNegativeInt | None]
    cases: dict[SplitName, NotNegativeInt | None]
    left_out: NotNegativeInt | None
    labels: tuple[str, ...] | None = None


class Trained(Frozen):
    """One round of training; the delta travels beside it.

    Attributes:
        consent: the task's model with this delta may be measured at the other sites; in the last
            round of a plan with `evaluation.own_models` alone.
    """

    kind: Literal["train"] = "train"
    patients: NotNegativeInt | None
    steps: NotNegativeInt
    loss: FiniteFloat | None
    consent: Consent | None = None


class Evaluated(Frozen):
    """Metric -> label -> mean over the site's `val` patients."""

    kind: Literal["evaluate"] = "evaluate"
    patients: NotNegativeInt | None
    scores: dict[str, dict[str, FiniteFloat | None]]


class Received(Frozen):
    """The released model has arrived and is stored; `model` is its digest."""

    kind: Literal["release"] = "release"
    model: Digest


class Refused(Frozen):
    """One coarse code; the reason stays at the site."""

    kind: Literal["refused"] = "refused"
    code: RefusalCode


Body = Annotated[Enlisted | Trained | Evaluated | Received | Refused, Field(discriminator="kind")]


class AnswerHeader(Frozen):
    """What a site answers to one task.

    Attributes:
        head: of the site's ledger, blinded: outside it says nothing, and the next task brings it
            back. None where the site keeps no ledger for the study.
    """

    format: Literal["fedseg-answer/1"] = "fedseg-answer/1"
    task: Digest
    site: SiteName
    body: Body
    head: Digest | None = None


class AnswerError(TrustError):
    """An answer that does not count, with a code for the record."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def task_digest(task: Buffer) -> str:
    """What an answer refers to: SHA-256 of the task's bytes."""
    return hashlib.sha256(task).hexdigest()


def seal_task(
    header: TaskHeader, model: Arrays | None = None, control: Arrays | None = None
) -> bytes:
    """Write a task; `control` is the server's control variate, which scaffold alone has."""
    return pack(header, {**(model or {}), **_prefixed(control or {})})


def open_task(data: Buffer, plan: StudyPlan) -> tuple[TaskHeader, dict[str, NDArray[Any]]]:
    """Open a task at a site; the tensors are views of `data`.

    Raises:
        TrustError: oversized or malformed, of another study or plan, of a round or attempt that the
            plan does not have, or the model is not the one that the header names.
    """
    header, model, _ = open_controlled_task(data, plan)
    return header, model


def open_controlled_task(
    data: Buffer, plan: StudyPlan
) -> tuple[TaskHeader, dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """As `open_task`, with the server's control variate beside the model; empty without one.

    Raises:
        TrustError: as `open_task`, or the control variate is not the one that the header names.
    """
    limit = task_limit(plan)
    header = peek(data, TaskHeader, max_bytes=limit)
    if (header.study, header.plan) != (plan.study, plan.digest):
        raise TrustError("the task belongs to another study or to a plan that is not approved here")
    require_place(header, plan)
    require_consent(header, plan)
    if header.roll is not None and header.stage != "enlist":
        raise TrustError("the task brings a list of sites, which only enlisting does")
    schema = task_schema(plan, header.stage)
    header, arrays = unpack(data, TaskHeader, max_bytes=limit, schema=schema)
    control = _unprefixed(arrays)
    model = {name: array for name, array in arrays.items() if not name.startswith(CONTROL)}
    if schema and digest_of(model) != header.model:
        raise TrustError("the task's model is not the one that its header names")
    if (digest_of(control) if control else None) != header.control:
        raise TrustError("the task's control variate is not the one that its header names")
    return header, model, control


def _prefixed(control: Arrays) -> dict[str, Any]:
    """A control variate under names that no model has."""
    return {CONTROL + name: array for name, array in control.items()}


def _unprefixed(arrays: Arrays) -> dict[str, Any]:
    """The control variate among a task's tensors."""
    found = (name for name in arrays if name.startswith(CONTROL))
    return {name.removeprefix(CONTROL): arrays[name] for name in found}


def require_place(header: TaskHeader, plan: StudyPlan) -> None:
    """Check that a plan has the round and the attempt that a task asks for.

    Raises:
        TrustError: it has not.
    """
    rounds = plan.aggregation.rounds
    places = {"enlist": (0, 0), "own": (rounds, rounds), "release": (rounds, rounds)}
    first, last = places.get(header.stage, (1, rounds))
    if not first <= header.round <= last or header.attempt > plan.aggregation.attempts:
        raise TrustError("the task asks for a round or an attempt that the plan does not have")


def require_consent(header: TaskHeader, plan: StudyPlan) -> None:
    """Check that a task brings a hospital's own model under a consent to just that, or none.

    Who signed the consent is for whoever has the list of sites to see.

    Raises:
        TrustError: the plan measures no own models, the consent is missing or is about another
            model, study or plan.
    """
    consent = header.consent
    if (header.stage == "own") != (consent is not None):
        raise TrustError("a hospital's own model comes with its consent, other models with none")
    if consent is None:
        return
    if not plan.evaluation.own_models:
        raise TrustError("the plan does not say that hospitals' own models are measured elsewhere")
    about = (consent.study, consent.plan, consent.model)
    if about != (plan.study, plan.digest, header.model):
        raise TrustError("the consent is about another model, study or plan than the task")


def seal_answer(
    header: AnswerHeader, delta: Arrays | None = None, plan: StudyPlan | None = None
) -> bytes:
    """Write an answer.

    Args:
        plan: where it is a private one, the answer's length follows from the plan, the site's name
            and the kind of body alone, whatever numbers the body holds.
    """
    if plan is None or plan.private is None:
        return pack(header, delta)
    return pack(header, delta, head_bytes=head_bytes_of(header, delta, plan))


def head_bytes_of(header: AnswerHeader, delta: Arrays | None, plan: StudyPlan) -> int:
    """How long the head of an answer of this kind can get: a private plan's is always that long."""
    longest = header.model_copy(
        update={"body": _longest_body(header.body, plan, header.site), "head": "f" * 64}
    )
    return len(packed(longest, delta)[1]) + 8


def _longest_body(body: Body, plan: StudyPlan, site: str) -> Body:
    """The body of this kind that takes the most bytes under a plan."""
    count, number = 2**31 - 1, -2.2250738585072014e-308
    splits: tuple[SplitName, ...] = get_args(SplitName)
    match body:
        case Enlisted():
            most = dict.fromkeys(splits, count)
            every = tuple(plan.task.labels)
            return Enlisted(patients=most, cases=most, left_out=count, labels=every)
        case Trained():
            consent = Consent(study=plan.study, plan="f" * 64, site=site, model="f" * 64)
            asked = plan.evaluation.own_models
            return Trained(
                patients=count, steps=count, loss=number, consent=consent if asked else None
            )
        case Evaluated():
            scores = dict.fromkeys(plan.task.labels, number)
            return Evaluated(patients=count, scores=dict.fromkeys(plan.evaluation.metrics, scores))
        case Received():
            return body
        case Refused():
            return Refused(code=max(get_args(RefusalCode), key=len))


def open_answer(
    data: Buffer,
    plan: StudyPlan,
    *,
    task: str,
    stage: StageName,
    site: str | None,
    model: str | None = None,
) -> tuple[AnswerHeader, dict[str, NDArray[Any]]]:
    """Open an answer at the coordinator.

    Args:
        data: the bytes as they came.
        plan: gives the schema that a delta must have.
        task: digest of the task that was sent.
        stage: the stage that is open.
        site: who should have answered, or None while sites introduce themselves.
        model: digest of the model that was sent; None where none was.

    Raises:
        AnswerError: with code `malformed` (a number that the plan withholds makes an answer so,
            too), `stale`, `site`, `stage` or `not_finite`, or with the site's own where it refused.
    """
    limit = answer_limit(plan, stage)
    try:
        kind = peek(data, AnswerHeader, max_bytes=limit).body.kind
        schema = answer_schema(plan, kind)
        header, delta = unpack(data, AnswerHeader, max_bytes=limit, schema=schema)
    except TrustError as error:
        raise AnswerError("malformed", str(error)) from None
    if header.task != task:
        raise AnswerError("stale", "the answer belongs to another task")
    if site is not None and header.site != site:
        raise AnswerError("site", f"the node of {site} answered as {header.site}")
    if header.body.kind == "refused":
        if plan.private and header.body.code in COARSER:
            raise AnswerError("malformed", "a refusal says more than the private plan lets out")
        raise AnswerError(header.body.code, "the site refused or failed; its audit has the reason")
    if header.body.kind != ("evaluate" if stage == "own" else stage):
        raise AnswerError("stage", f"a {header.body.kind} answer came in the stage {stage}")
    body = header.body
    wrong = (
        _outside_plan(body, plan, model)
        or _odd_labels(body, plan)
        or _odd_consent(body, plan, header.site)
        or _not_let_out(body, plan)
    )
    if wrong:
        raise AnswerError("malformed", wrong)
    bad = [name for name, array in delta.items() if not np.isfinite(array).all()]
    if bad:
        raise AnswerError("not_finite", f"{len(bad)} tensors hold NaN or infinity, as {bad[0]!r}")
    return header, delta


def _outside_plan(body: Body, plan: StudyPlan, model: str | None) -> str | None:
    """What an answer says that cannot be true of this plan and this task, or None."""
    if isinstance(body, Received) and body.model != model:
        return "another model is reported as received than was sent"
    if isinstance(body, Trained):
        steps = plan.training.steps_per_round
        if body.steps != steps or (body.loss is not None and body.loss < 0):
            return f"a round has {steps} steps and a loss of at least 0, others were reported"
    if isinstance(body, Evaluated):
        if body.scores.keys() != set(plan.evaluation.metrics):
            return "the scores are not of the plan's metrics"
        for metric, scores in body.scores.items():
            known = (value for value in scores.values() if value is not None)
            highest = float("inf") if metric == "hd95" else 1.0
            if not scores.keys() <= plan.task.labels.keys():
                return "the scores name labels that the plan has not"
            if not all(0 <= value <= highest for value in known):
                return f"a {metric} is outside its range"
    return None


def _odd_labels(body: Body, plan: StudyPlan) -> str | None:
    """What is wrong with the labels that a site declares, or None."""
    if not isinstance(body, Enlisted) or body.labels is None:
        return None
    told = set(body.labels)
    if told and len(told) == len(body.labels) and told <= plan.task.labels.keys():
        return None
    return "the labels that it annotates are not at least one of the plan's, each once"


def _odd_consent(body: Body, plan: StudyPlan, site: str) -> str | None:
    """What is wrong with a consent as such, or None; which model it is about is seen later."""
    if not isinstance(body, Trained) or body.consent is None:
        return None
    about = (body.consent.study, body.consent.plan, body.consent.site)
    if plan.evaluation.own_models and about == (plan.study, plan.digest, site):
        return None
    return "a consent came that the plan does not ask for, or that is not this site's"


def _not_let_out(body: Body, plan: StudyPlan) -> str | None:
    """Which number an answer says although the plan withholds it, or None.

    A hospital may withhold more than the plan asks. Of few patients, only what an answer says
    itself can be held against `suppress_below`.
    """
    outputs = plan.privacy.outputs
    few = body.patients if isinstance(body, Trained | Evaluated) else None
    said: list[tuple[str, Openness, int | None, bool]] = []
    if isinstance(body, Enlisted):
        for split in body.patients.keys() | body.cases.keys():
            patients, cases = body.patients.get(split), body.cases.get(split)
            there = patients is not None or cases is not None
            said.append((f"counts of {split}", outputs.counts, patients, there))
            if outputs.counts == "suppressed" and patients is None and cases is not None:
                return "cases are told of patients whose number is suppressed"
        if body.left_out is not None and outputs.counts != "plain":
            return "the number of cases left out is told, which the plan withholds"
    if isinstance(body, Trained | Evaluated):
        said.append(("the number of patients", outputs.counts, few, few is not None))
    if isinstance(body, Trained):
        said.append(("a loss", outputs.losses, few, body.loss is not None))
    if isinstance(body, Evaluated):
        told = any(v is not None for scores in body.scores.values() for v in scores.values())
        said.append(("scores", outputs.metrics, few, told))
    for what, openness, patients, there in said:
        if there and openness == "none":
            return f"{what}: told, although the plan withholds it"
        scarce = patients is not None and patients < outputs.suppress_below
        if there and openness == "suppressed" and scarce:
            return f"{what}: told of too few patients, which the plan suppresses"
    return None


def task_schema(plan: StudyPlan, stage: StageName) -> tuple[TensorSpec, ...]:
    """The tensors that a task of a stage carries."""
    if stage == "enlist":
        return ()
    built = plan.built
    if stage != "train" or plan.aggregation.strategy != "scaffold":
        return built.tensors
    control = (s.model_copy(update={"name": CONTROL + s.name}) for s in built.updated)
    return (*built.tensors, *control)


def answer_schema(plan: StudyPlan, kind: str) -> tuple[TensorSpec, ...]:
    """The tensors that an answer with a body of this kind carries."""
    return plan.built.updated if kind == "train" else ()


def task_limit(plan: StudyPlan) -> int:
    """The largest task of a plan in bytes."""
    return _limit_of(task_schema(plan, "train"))


def model_limit(plan: StudyPlan) -> int:
    """The largest container in bytes that carries the plan's model, whatever its header says."""
    return _limit_of(plan.built.tensors)


def answer_limit(plan: StudyPlan, stage: StageName) -> int:
    """The largest answer to a task of a stage in bytes."""
    return _limit_of(answer_schema(plan, stage))


def _limit_of(schema: tuple[TensorSpec, ...]) -> int:
    """The largest message in bytes that carries these tensors."""
    return HEADER_ROOM + sum(spec.nbytes + TENSOR_ROOM for spec in schema)
