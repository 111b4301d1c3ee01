"""What a broken or malicious site can send to the coordinator."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_plans import answer, body_of, built_plan, tiny_model

from fedseg.container import pack
from fedseg.frozen import Frozen
from fedseg.plan import StudyPlan
from fedseg.updates import (
    AnswerError,
    Enlisted,
    Evaluated,
    Refused,
    StageName,
    Trained,
    answer_limit,
    open_answer,
    task_limit,
)

PLAN = built_plan()
TASK = "7" * 64
GOOD = answer(TASK, "site_a", body_of("train"), tiny_model(1))


def refusal_of(
    data: bytes, stage: StageName = "train", site: str | None = "site_a", plan: StudyPlan = PLAN
) -> AnswerError:
    """The error that an answer meets; its words are few, printable and safe in any log."""
    with pytest.raises(AnswerError) as caught:
        open_answer(data, plan, task=TASK, stage=stage, site=site)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    return caught.value


def train_answer(**changes: Any) -> bytes:
    delta = {name: a for name, a in (tiny_model(1) | changes).items() if a is not None}
    return answer(TASK, "site_a", body_of("train"), delta)


class Forged(Frozen):
    """An answer's header with whatever body."""

    format: str = "fedseg-answer/1"
    task: str = TASK
    site: str = "site_a"
    body: dict[str, Any]


def forged(delta: Any = None, **body: Any) -> bytes:
    return pack(Forged(body=body), delta)


def test_an_answer_to_another_task_is_stale() -> None:
    data = answer("8" * 64, "site_a", body_of("train"), tiny_model(1))
    assert refusal_of(data).code == "stale"


def test_a_site_cannot_answer_for_another() -> None:
    assert refusal_of(GOOD, site="site_b").code == "site"


def test_a_stale_answer_of_another_site_cannot_be_replayed_as_ones_own() -> None:
    assert refusal_of(answer("8" * 64, "site_b", Refused(code="data"))).code == "stale"


@pytest.mark.parametrize("kind", ["enlist", "evaluate", "train"])
@pytest.mark.parametrize("stage", ["enlist", "evaluate", "train"])
def test_an_answer_to_another_stage_is_refused(kind: str, stage: Any) -> None:
    data = answer(TASK, "site_a", body_of(kind), tiny_model(1) if kind == "train" else None)
    if kind == stage:
        open_answer(data, PLAN, task=TASK, stage=stage, site="site_a")
    else:
        assert refusal_of(data, stage).code == "stage"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["conv.weight", "gain"])
def test_one_value_that_is_not_finite_is_refused(name: str, value: float) -> None:
    array = tiny_model(1)[name].copy()
    array.reshape(-1)[-1] = value
    refused = refusal_of(train_answer(**{name: array}))
    assert refused.code == "not_finite"
    assert name in str(refused)


@pytest.mark.parametrize(
    "changes",
    [
        {"conv.bias": None},
        {"backdoor": np.zeros(3, np.float32)},
        {"conv.bias": np.zeros((2, 2), np.float32)},
        {"conv.bias": np.zeros(0, np.float32)},
        {"conv.bias": np.zeros(2, np.float64)},
        {"conv.bias": np.zeros(2, np.int64)},
        {"gain": np.zeros(1, np.float32)},
    ],
)
def test_other_names_shapes_and_types_are_malformed(changes: dict[str, Any]) -> None:
    assert refusal_of(train_answer(**changes)).code == "malformed"


def test_an_update_without_tensors_is_malformed() -> None:
    assert refusal_of(answer(TASK, "site_a", body_of("train"))).code == "malformed"


@pytest.mark.parametrize("stage", ["enlist", "evaluate"])
def test_tensors_where_none_belong_are_malformed(stage: Any) -> None:
    data = answer(TASK, "site_a", body_of(stage), {"smuggled": np.zeros(4, np.float32)})
    assert refusal_of(data, stage).code == "malformed"
    refused = answer(TASK, "site_a", Refused(code="data"), {"smuggled": np.zeros(4, np.float32)})
    assert refusal_of(refused, stage).code == "malformed"


def test_an_oversized_answer_is_not_parsed() -> None:
    limit = task_limit(PLAN)
    assert "at most" in str(refusal_of(bytes(limit + 1)))
    assert "at most" in str(refusal_of(GOOD + bytes(limit)))
    assert "at most" in str(refusal_of(bytes(answer_limit(PLAN, "evaluate") + 1), "evaluate"))


@pytest.mark.parametrize(
    "body",
    [
        {"kind": "train", "patients": 2**31, "steps": 1, "loss": 0.1},
        {"kind": "train", "patients": -1, "steps": 1, "loss": 0.1},
        {"kind": "train", "patients": 1.5, "steps": 1, "loss": 0.1},
        {"kind": "train", "patients": 10**400, "steps": 1, "loss": 0.1},
        {"kind": "train", "patients": 1, "steps": 2**31, "loss": 0.1},
        {"kind": "train", "patients": 1, "steps": 1, "loss": None},
        {"kind": "train", "patients": 1, "steps": 1, "loss": 0.1, "more": "patient 0815"},
        {"kind": "train", "patients": 1, "steps": 1},
        {"kind": "sing"},
        {"kind": "\ud800" * 1000},
        {},
        {"kind": "refused", "code": "because patient 0815 is odd"},
        {"kind": "refused", "code": "x" * 100_000},
    ],
    ids=lambda body: ascii(body)[:60],
)
def test_a_body_that_is_not_as_declared_is_malformed(body: dict[str, Any]) -> None:
    head = json.dumps({"format": "fedseg-answer/1", "task": TASK, "site": "site_a", "body": body})
    layout = json.dumps({"__metadata__": {"fedseg": head}}).encode()
    assert refusal_of(struct.pack("<Q", len(layout)) + layout).code == "malformed"


@pytest.mark.parametrize("loss", ["NaN", "Infinity", "1e999"])
def test_a_loss_that_is_not_finite_is_malformed(loss: str) -> None:
    data = GOOD.replace(b'\\"loss\\":0.5', b'\\"loss\\":' + loss.encode())
    assert data != GOOD
    short = len(data) - len(GOOD)
    data = struct.pack("<Q", struct.unpack("<Q", GOOD[:8])[0] + short) + data[8:]
    assert refusal_of(data).code == "malformed"


@pytest.mark.parametrize(
    "site", ["", "../../etc", "a/b", "a" * 65, "site a", "<script>", "site_a\n", "\ud800"]
)
def test_a_site_name_is_no_path_and_no_markup(site: str) -> None:
    head = {"format": "fedseg-answer/1", "task": TASK, "site": site}
    text = json.dumps(head | {"body": body_of("enlist").model_dump()})
    layout = json.dumps({"__metadata__": {"fedseg": text}}).encode()
    data = struct.pack("<Q", len(layout)) + layout
    assert refusal_of(data, "enlist", None).code == "malformed"


@pytest.mark.parametrize(
    "scores",
    [
        {"dice": {"<script>alert(1)</script>": 1.0}},
        {"accuracy": {"anterior": 1.0}},
        {"hd95": {"anterior": 1.0}},
        {f"m{n}": {} for n in range(1000)},
    ],
)
def test_scores_that_the_plan_does_not_ask_for_are_malformed(scores: Any) -> None:
    data = answer(TASK, "site_a", Evaluated(patients=1, scores=scores))
    assert refusal_of(data, "evaluate").code == "malformed"


def test_scores_of_fewer_labels_or_without_value_are_fine() -> None:
    for scores in ({"dice": {}}, {"dice": {"anterior": None}}):
        data = answer(TASK, "site_a", Evaluated(patients=0, scores=scores))
        open_answer(data, PLAN, task=TASK, stage="evaluate", site="site_a")


def test_a_split_that_nobody_knows_is_malformed() -> None:
    body = body_of("enlist").model_dump() | {"patients": {"patient_0815": 1}}
    assert refusal_of(forged(**body), "enlist", None).code == "malformed"
    assert isinstance(body_of("enlist"), Enlisted)


@pytest.mark.parametrize("code", ["plan", "task", "data", "not_finite", "failed"])
def test_a_refusal_carries_its_coarse_code_alone(code: Any) -> None:
    for stage in ("enlist", "train", "evaluate"):
        refused = refusal_of(answer(TASK, "site_a", Refused(code=code)), stage)  # type: ignore[arg-type]
        assert refused.code == code


@given(st.binary(max_size=300))
def test_garbage_is_malformed(data: bytes) -> None:
    assert refusal_of(data).code == "malformed"


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.integers(0, 8))
def test_a_damaged_answer_is_refused_or_has_the_plans_tensors(
    place: int, change: int, cut: int
) -> None:
    data = bytearray(GOOD[: len(GOOD) - cut])
    data[min(place, len(data) - 1)] ^= change
    try:
        header, delta = open_answer(bytes(data), PLAN, task=TASK, stage="train", site="site_a")
    except AnswerError:
        return
    assert isinstance(header.body, Trained)
    assert header.body.patients < 2**31
    assert all(np.isfinite(array).all() for array in delta.values())
    assert {n: a.shape for n, a in delta.items()} == {n: a.shape for n, a in tiny_model().items()}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("train", {"steps": 21}),
        ("train", {"loss": -0.1}),
        ("evaluate", {"scores": {"dice": {"anterior": 1.1}}}),
        ("evaluate", {"scores": {"dice": {"anterior": -0.1}}}),
        ("evaluate", {"scores": {}}),
    ],
)
def test_what_cannot_be_true_of_the_plan_is_malformed(stage: Any, changes: Any) -> None:
    body = body_of(stage).model_dump() | changes
    delta = tiny_model() if stage == "train" else {}
    data = answer(TASK, "site_a", type(body_of(stage)).model_validate(body), delta)
    with pytest.raises(AnswerError) as refused:
        open_answer(data, PLAN, task=TASK, stage=stage, site="site_a")
    assert refused.value.code == "malformed"
