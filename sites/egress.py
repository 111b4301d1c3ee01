"""The way out of the trainer: what an answer may say, and what of it the plan withholds.

An allow-list. Each type of message and each of its fields is named here with what it is about; a
type or a field that nobody named does not leave, whatever wrote it. The trainer passes every body
through `permitted`, which withholds what the plan's outputs do not let out; the gate has
`require_permitted` look at every answer again before it is sealed, since a trainer is much code and
this is little. Numbers about few patients are withheld where the plan says `suppressed`: about how
many they are is read from the body itself, before anything of it is withheld.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from pydantic import JsonValue

from fedseg.container import peek, unpack
from fedseg.errors import PrivacyError, TrustError
from fedseg.plan import StudyPlan
from fedseg.promise import Openness
from fedseg.result import PatientScores, Scores, mean_scores
from fedseg.updates import (
    COARSER,
    AnswerHeader,
    Body,
    Enlisted,
    Evaluated,
    Received,
    Refused,
    Trained,
    answer_limit,
    answer_schema,
    head_bytes_of,
)

About = Literal["protocol", "counts", "losses", "metrics"]

HEADER: Mapping[str, About] = {
    "format": "protocol",
    "task": "protocol",
    "site": "protocol",
    "body": "protocol",
    "head": "protocol",
}
BODIES: Mapping[type[Body], Mapping[str, About]] = {
    Enlisted: {
        "kind": "protocol",
        "patients": "counts",
        "cases": "counts",
        "left_out": "counts",
        "labels": "protocol",
    },
    Trained: {
        "kind": "protocol",
        "steps": "protocol",
        "patients": "counts",
        "loss": "losses",
        "consent": "protocol",
    },
    Evaluated: {"kind": "protocol", "patients": "counts", "scores": "metrics"},
    Received: {"kind": "protocol", "model": "protocol"},
    Refused: {"kind": "protocol", "code": "protocol"},
}


def permitted(
    body: Body,
    plan: StudyPlan,
    suppress_below: int | None = None,
    annotated: Sequence[str] | None = None,
) -> Body:
    """What leaves of a body: the same type, with None for whatever is withheld.

    Args:
        body: as the trainer made it, nothing withheld yet: its own counts say how many patients
            its numbers are about.
        plan: the approved one; its `privacy.outputs` say what leaves.
        suppress_below: the hospital's own least number of patients, where it is above the plan's.
        annotated: the labels that the hospital declared to annotate; None is all of the plan's.

    Returns:
        Counts by split are withheld together with the split's patients. `left_out` is withheld
        wherever counts are not plain, because nobody knows how many patients these cases are of.

    Raises:
        PrivacyError: a type or a field that is not on the list, scores of other metrics or labels
            than the plan's, or numbers that the plan wants noised and that cannot be.
    """
    _require_listed(body)
    outputs, least = plan.privacy.outputs, _least(plan, suppress_below)
    match body:
        case Enlisted():
            _require_plans_labels(body, plan)
            kept = {
                split: _lets_out(outputs.counts, patients, least)
                for split, patients in body.patients.items()
            }
            return Enlisted(
                patients={s: n if kept[s] else None for s, n in body.patients.items()},
                cases={s: n if kept.get(s) else None for s, n in body.cases.items()},
                left_out=body.left_out if outputs.counts == "plain" else None,
                labels=body.labels,
            )
        case Trained():
            loss = _lets_out(outputs.losses, body.patients, least)
            counts = _lets_out(outputs.counts, body.patients, least)
            return Trained(
                patients=body.patients if counts else None,
                steps=body.steps,
                loss=body.loss if loss else None,
                consent=body.consent,
            )
        case Evaluated():
            _require_plans_scores(body, plan, annotated)
            scores = _lets_out(outputs.metrics, body.patients, least)
            counts = _lets_out(outputs.counts, body.patients, least)
            return Evaluated(
                patients=body.patients if counts else None,
                scores=body.scores if scores else _withheld(plan),
            )
        case Received():
            return body
        case Refused():
            return Refused(code=COARSER.get(body.code, body.code) if plan.private else body.code)


def means(
    patients: Sequence[PatientScores], plan: StudyPlan, suppress_below: int | None = None
) -> dict[str, Scores]:
    """Mean metrics over patients, for an `Evaluated`: a label few of them have is about few.

    Where the plan says `suppressed`, a mean over fewer patients than that is None, also where the
    cohort as a whole has enough: a rare label may be one patient's.

    Args:
        patients: each one's metrics; None where one is undefined for the patient.
        plan: the approved one.
        suppress_below: as in `permitted`.
    """
    found = mean_scores(patients, plan.evaluation.metrics)
    if plan.privacy.outputs.metrics != "suppressed":
        return found
    least = _least(plan, suppress_below)
    for metric in plan.evaluation.metrics:
        for label in found[metric]:
            having = sum(patient.of(metric).get(label) is not None for patient in patients)
            if having < least:
                found[metric][label] = None
    return found


@dataclass(frozen=True)
class Outgoing:
    """A whole answer that may leave.

    Attributes:
        header: all of it that is no tensor.
        fields: the same as lines `name=value`, the values in JSON.
        tensors: how many there are, and how many bytes they have.
        content: SHA-256 of the answer before it is sealed.
    """

    header: AnswerHeader
    fields: tuple[str, ...]
    tensors: tuple[int, int]
    content: str


class HouseRule(TypedDict):
    """What a hospital's own policy and declaration add to a plan; see `outgoing`."""

    suppress_below: int | None
    annotated: Sequence[str] | None
    consents: bool


def outgoing(
    plain: bytes,
    plan: StudyPlan,
    suppress_below: int | None = None,
    annotated: Sequence[str] | None = None,
    *,
    consents: bool = False,
) -> Outgoing:
    """Look at an answer as it is about to be sealed, or to leave once more; see `permitted`.

    Args:
        consents: the hospital's policy lets its own model go to the others as it stands now.

    Raises:
        PrivacyError: it is not what `require_permitted` lets out, has other tensors than the plan's
            after training or any after something else, or is a private plan's and not of the
            length that all its answers of this kind have.
    """
    limit = answer_limit(plan, "train")
    try:
        kind = peek(plain, AnswerHeader, max_bytes=limit).body.kind
        schema = answer_schema(plan, kind)
        header, delta = unpack(plain, AnswerHeader, max_bytes=limit, schema=schema)
    except TrustError as error:
        raise PrivacyError(f"an answer is none that may leave: {error}") from None
    require_permitted(header, plan, suppress_below, annotated, consents=consents)
    sizes = [array.nbytes for array in delta.values()]
    if plan.private and len(plain) != head_bytes_of(header, delta, plan) + sum(sizes):
        raise PrivacyError("the length of an answer of a private plan depends on what it says")
    fields = tuple(f"{name}={json.dumps(value)}" for name, value in _flat("", _plainly(header)))
    content = hashlib.sha256(plain).hexdigest()
    return Outgoing(header, fields, (len(sizes), sum(sizes)), content)


def require_permitted(
    header: AnswerHeader,
    plan: StudyPlan,
    suppress_below: int | None = None,
    annotated: Sequence[str] | None = None,
    *,
    consents: bool = False,
) -> None:
    """Look at an answer once more before it is sealed.

    Numbers whose patients are withheld in the same answer cannot be held against `suppress_below`
    any more: what is not to leave at all, and what says itself that it is about too few, is found.

    Raises:
        PrivacyError: it says what is not on the list, or what the plan withholds.
    """
    if type(header).model_fields.keys() != HEADER.keys():
        raise PrivacyError(_unlisted("an answer", type(header).model_fields.keys() ^ HEADER.keys()))
    body = header.body
    _require_listed(body)
    outputs, least = plan.privacy.outputs, _least(plan, suppress_below)
    said: list[tuple[Openness, int | None, bool]] = []  # how it leaves, of how many, whether it is
    match body:
        case Enlisted():
            _require_plans_labels(body, plan)
            for split, patients in body.patients.items():
                there = patients is not None or body.cases.get(split) is not None
                said.append((outputs.counts, patients, there))
            if body.left_out is not None and outputs.counts != "plain":
                raise PrivacyError("the number of cases left out is withheld by the plan")
        case Trained():
            said.append((outputs.counts, body.patients, body.patients is not None))
            said.append((outputs.losses, body.patients, body.loss is not None))
            if body.consent is not None and not (consents and plan.evaluation.own_models):
                raise PrivacyError(
                    "an answer lets this hospital's own model go to the others, which plan or "
                    "policy.yaml do not allow (any more)"
                )
        case Evaluated():
            _require_plans_scores(body, plan, annotated)
            told = any(v is not None for scores in body.scores.values() for v in scores.values())
            said.append((outputs.counts, body.patients, body.patients is not None))
            said.append((outputs.metrics, body.patients, told))
        case Refused():
            if plan.private and body.code in COARSER:
                raise PrivacyError("a refusal says more than a private plan lets out")
        case Received():
            pass
    for openness, patients, there in said:
        known = patients is not None and openness == "suppressed" and patients < least
        if there and (openness == "none" or known):
            raise PrivacyError(
                f"an answer ({body.kind}) holds numbers that the plan withholds: it does not leave"
            )


def _plainly(header: AnswerHeader) -> JsonValue:
    """A header as JSON has it."""
    value: JsonValue = header.model_dump(mode="json")
    return value


def _flat(name: str, value: JsonValue) -> Iterator[tuple[str, JsonValue]]:
    """Every value with its path; an empty mapping is a value too."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else key, inner)
    else:
        yield name, value


def _require_listed(body: Body) -> None:
    """Refuse a type or a field that is not on the list."""
    fields = BODIES.get(type(body))
    if fields is None:
        raise PrivacyError(f"messages of type {type(body).__name__} are not on the list of egress")
    if type(body).model_fields.keys() != fields.keys():
        odd = type(body).model_fields.keys() ^ fields.keys()
        raise PrivacyError(_unlisted(type(body).__name__, odd))


def _require_plans_labels(body: Enlisted, plan: StudyPlan) -> None:
    """Refuse words that are no labels of the plan where a hospital declares what it annotates."""
    if not set(body.labels or ()) <= plan.task.labels.keys():
        raise PrivacyError("what a hospital says of its labels names others than the plan's")


def _unlisted(what: str, odd: set[str]) -> str:
    """Names the fields on which the message and the list differ."""
    return f"{what} has fields that the list of egress does not name: {', '.join(sorted(odd))}"


def _least(plan: StudyPlan, suppress_below: int | None) -> int:
    """The number of patients below which suppressed numbers are withheld."""
    return max(plan.privacy.outputs.suppress_below, suppress_below or 0)


def _lets_out(openness: Openness, patients: int | None, least: int) -> bool:
    """Whether a number about so many patients leaves; about an unknown number it does not."""
    if openness == "suppressed":
        return patients is not None and patients >= least
    return openness != "none"


def _require_plans_scores(
    body: Evaluated, plan: StudyPlan, annotated: Sequence[str] | None
) -> None:
    """Refuse scores of something else; noised ones are all there, whoever the patients were."""
    labels = plan.task.labels.keys()
    drawn = labels if annotated is None else set(annotated)
    if body.scores.keys() != set(plan.evaluation.metrics) or not all(
        scores.keys() <= labels for scores in body.scores.values()
    ):
        raise PrivacyError("scores of other metrics or labels than the plan's do not leave")
    if plan.privacy.outputs.metrics != "noised":
        return
    if plan.private is None or plan.noise.metrics is None:
        raise PrivacyError("the plan wants noised metrics and has no noise for them: build it anew")
    for scores in body.scores.values():
        there = {label for label, value in scores.items() if value is not None}
        if scores.keys() != labels or there != drawn:
            raise PrivacyError(
                "noised metrics need a value for every label that the hospital declared to "
                "annotate, and for no other: which are missing tells of patients"
            )


def _withheld(plan: StudyPlan) -> dict[str, dict[str, float | None]]:
    """Scores that say nothing."""
    return {metric: dict.fromkeys(plan.task.labels) for metric in plan.evaluation.metrics}
