"""Tasks and answers: what is sealed opens again, and what an identity depends on."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load
from small_plans import answer, body_of, built_plan, tiny_model

from fedseg.arrays import digest_of, seed_for
from fedseg.container import unpack
from fedseg.errors import TrustError
from fedseg.plan import StudyPlan
from fedseg.updates import (
    AnswerError,
    AnswerHeader,
    Body,
    Enlisted,
    Evaluated,
    Refused,
    TaskHeader,
    Trained,
    answer_limit,
    answer_schema,
    open_answer,
    open_controlled_task,
    open_task,
    seal_answer,
    seal_task,
    task_digest,
    task_limit,
)

PLAN = built_plan()


def task_of(stage: Any, **changes: Any) -> bytes:
    model = None if stage == "enlist" else tiny_model()
    header = TaskHeader(
        study=PLAN.study,
        plan=PLAN.digest,
        round={"enlist": 0, "release": 3}.get(stage, 1),
        stage=stage,
        attempt=1,
        model=None if model is None else digest_of(model),
    )
    return seal_task(header.model_copy(update=changes), model)


@pytest.mark.parametrize("stage", ["enlist", "train", "evaluate", "release"])
def test_a_task_opens_to_what_was_sealed(stage: str) -> None:
    data = task_of(stage)
    header, model = open_task(data, PLAN)
    assert header.stage == stage
    assert digest_of(model) == (digest_of(tiny_model()) if stage != "enlist" else digest_of({}))
    assert len(data) <= task_limit(PLAN)


def test_a_scaffold_task_opens_to_model_and_control_each_as_the_header_names_it() -> None:
    sgd = {"name": "sgd", "momentum": 0.0}
    plan = built_plan(aggregation__strategy="scaffold", training__optimiser=sgd)
    model, control = tiny_model(), tiny_model(7)
    header = TaskHeader(
        study=plan.study, plan=plan.digest, round=1, stage="train", attempt=1,
        model=digest_of(model), control=digest_of(control),
    )  # fmt: skip
    opened, *found = open_controlled_task(seal_task(header, model, control), plan)
    assert opened == header
    assert [digest_of(each) for each in found] == [digest_of(model), digest_of(control)]
    with pytest.raises(TrustError, match="control variate is not the one"):
        open_controlled_task(seal_task(header, model, model), plan)
    with pytest.raises(TrustError, match="model is not the one"):
        open_controlled_task(seal_task(header, control, control), plan)


def test_a_task_is_read_where_it_lies_without_a_copy(tmp_path: Path) -> None:
    data = task_of("train")
    (tmp_path / "task").write_bytes(data)
    with (tmp_path / "task").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for buffer in (data, bytearray(data), memoryview(bytearray(data)), mapped):
        _, model = open_task(buffer, PLAN)
        assert task_digest(buffer) == task_digest(data)
        assert digest_of(model) == digest_of(tiny_model())
        assert all(np.shares_memory(a, np.frombuffer(buffer, np.uint8)) for a in model.values())
        assert not any(array.flags.writeable for array in model.values())


def test_a_receipt_is_of_the_model_that_was_sent() -> None:
    sent, task = digest_of(tiny_model()), "a" * 64
    for model, code in ((sent, None), ("0" * 64, "malformed"), (None, "malformed")):
        data = answer(task, "site_a", body_of("release", model=sent))
        try:
            open_answer(data, PLAN, task=task, stage="release", site="site_a", model=model)
        except AnswerError as error:
            assert error.code == code
        else:
            assert code is None


def test_a_task_is_known_by_the_digest_of_its_bytes() -> None:
    assert task_digest(b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert task_of("train") == task_of("train")
    others = [task_of("train", round=2), task_of("train", attempt=2), task_of("evaluate")]
    assert len({task_digest(data) for data in (task_of("train"), *others)}) == 4


@pytest.mark.parametrize("stage", ["enlist", "train", "evaluate"])
def test_an_answer_opens_to_what_was_sealed(stage: Any) -> None:
    delta = tiny_model(1) if stage == "train" else None
    data = answer("a" * 64, "site_a", body_of(stage), delta)
    for site in ("site_a", None):
        header, found = open_answer(data, PLAN, task="a" * 64, stage=stage, site=site)
        assert (header.site, header.body) == ("site_a", body_of(stage))
        assert digest_of(found) == digest_of(delta or {})


def test_a_refusal_is_small_and_says_one_word() -> None:
    data = answer("a" * 64, "site_a", Refused(code="data"))
    assert len(data) < 400


def test_a_model_of_many_long_names_fits_its_limit() -> None:
    model = {f"{n:03d}" + "\N{SNOWMAN}" * 253: np.zeros(1, np.float32) for n in range(50)}
    plan = built_plan(model)
    data = answer("a" * 64, "s" * 64, body_of("train"), model)
    open_answer(data, plan, task="a" * 64, stage="train", site=None)


def test_digests_depend_on_names_shapes_types_and_values() -> None:
    model = {"a": np.arange(4, dtype=np.float32), "b": np.zeros((0, 3), np.float32)}
    digests = {
        digest_of(model),
        digest_of({"a": model["a"]}),
        digest_of({"c": model["a"], "b": model["b"]}),
        digest_of({**model, "a": model["a"].reshape(2, 2)}),
        digest_of({**model, "a": model["a"].view(np.int32).astype(np.int64)}),
        digest_of({**model, "a": -model["a"]}),
        digest_of({**model, "b": np.zeros((3, 0), np.float32)}),
    }
    assert len(digests) == 7
    big_endian = {
        name: array.astype(array.dtype.newbyteorder(">")) for name, array in model.items()
    }
    turned = {name: np.asfortranarray(array) for name, array in reversed(model.items())}
    assert digest_of(big_endian) == digest_of(turned) == digest_of(model)


def test_seeds_come_from_names_alone() -> None:
    places = [
        (0, "a", 1, "x"),
        (1, "a", 1, "x"),
        (0, "b", 1, "x"),
        (0, "a", 2, "x"),
        (0, "a", 1, "y"),
    ]
    seeds = [seed_for(*place) for place in places]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_for(0, "hospital_a", 1, "patches") == seed_for(0, "hospital_a", 1, "patches")


def private_plan() -> StudyPlan:
    return built_plan(
        privacy={
            "guarantee": "local",
            "epsilon": 8.0,
            "delta": 1e-5,
            "clip_norm": 1.0,
            "expected_patients": 10,
        },
        aggregation__weighting="uniform",
        training={"gradient_clip_norm": None},
    )


SCORES = [
    {"dice": {"anterior": a, "posterior": b}}
    for a, b in ((None, None), (1.0, 0.0), (0.123456789012345678, 5e-324), (0.5, None))
]


@pytest.mark.parametrize(
    "bodies",
    [
        [
            Trained(patients=n, steps=20, loss=x)
            for n, x in ((None, None), (9, 0.5), (10**6, 5e-324))
        ],
        [Evaluated(patients=3, scores=scores) for scores in SCORES],
        [
            Enlisted(patients={}, cases={}, left_out=None),
            Enlisted(patients={"train": 1234}, cases={"train": None, "val": 3}, left_out=17),
            Enlisted(patients={}, cases={}, left_out=None, labels=("anterior",)),
            Enlisted(patients={}, cases={}, left_out=None, labels=("anterior", "posterior")),
        ],
        [Refused(code="plan"), Refused(code="not_finite"), Refused(code="failed")],
    ],
)
def test_a_private_answers_length_does_not_depend_on_what_it_says(bodies: list[Body]) -> None:
    plan, delta = private_plan(), tiny_model() if isinstance(bodies[0], Trained) else None
    sizes, open_sizes = set(), set()
    for body in bodies:
        for head in (None, "e" * 64):
            header = AnswerHeader(task="a" * 64, site="site_a", body=body, head=head)
            data = seal_answer(header, delta, plan)
            sizes.add(len(data))
            open_sizes.add(len(seal_answer(header, delta, PLAN)))
            schema = answer_schema(plan, body.kind)
            limit = answer_limit(plan, "train")
            opened, tensors = unpack(data, AnswerHeader, max_bytes=limit, schema=schema)
            assert opened == header
            assert digest_of(tensors) == digest_of(delta or {})
            if delta:
                assert load(data).keys() == delta.keys()  # the safetensors library reads it too
    assert len(sizes) == 1
    assert len(open_sizes) > 1
