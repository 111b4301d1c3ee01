"""What a malicious coordinator can send to a trainer, and what it learns from the answer."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_plans import values

from fedseg.arrays import digest_of
from fedseg.errors import TrustError
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Case, Cohort
from fedseg.modelfile import load_model
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.security.identity import Roll, sign_roll
from fedseg.security.keys import SigningKey
from fedseg.updates import (
    AnswerHeader,
    TaskHeader,
    open_answer,
    open_task,
    peek,
    seal_task,
    task_digest,
    task_limit,
)
from sites.journal import Journal
from sites.trainer import Trainer

SECRET = "patient-0815"
_UNBUILT = StudyPlan.model_validate(
    values(task__spacing_mm=[1.0, 1.0, 1.0], training__steps_per_round=1)
)
_RECORD, MODEL = initial_model(_UNBUILT)
PLAN = _UNBUILT.model_copy(update={"initial": _RECORD})


def header(**changes: Any) -> TaskHeader:
    """The header of a good training task, some fields changed without a check."""
    good = TaskHeader(
        study=PLAN.study,
        plan=PLAN.digest,
        round=1,
        stage="train",
        attempt=1,
        model=PLAN.built.digest,
    )
    return good.model_copy(update=changes)


def model_with(**changes: Any) -> dict[str, Any]:
    """The model with its first tensor changed by a function, or others put in or taken out."""
    found = dict(MODEL)
    first = sorted(found)[0]
    for key, value in changes.items():
        name = first if key == "first" else key
        if value is None:
            del found[name]
        else:
            found[name] = value(found[name]) if callable(value) else value
    return found


ROLL = sign_roll(
    Roll(
        study=PLAN.study,
        version=1,
        issued="2026-01-01T00:00:00+00:00",
        valid_until="2027-01-01T00:00:00+00:00",
    ),
    SigningKey.generate(),
)
GOOD = seal_task(header(), MODEL)


def sealed(model: dict[str, Any], **changes: Any) -> bytes:
    """A task whose header names exactly the model that it carries."""
    return seal_task(header(**{"model": digest_of(model)} | changes), model)


ATTACKS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "garbage": lambda: b"\xff" * 1000,
    "a claimed exabyte": lambda: struct.pack("<Q", 2**60) + b"{}",
    "deep nesting": lambda: struct.pack("<Q", 10**5) + b"[" * 10**5,
    "oversized": lambda: GOOD + bytes(task_limit(PLAN)),
    "cut short": lambda: GOOD[:-1],
    "longer": lambda: GOOD + b"x",
    "another plan": lambda: seal_task(header(plan="0" * 64), MODEL),
    "another study": lambda: seal_task(header(study="other"), MODEL),
    "another format": lambda: seal_task(header(format="fedseg-task/2"), MODEL),
    "a stage of its own": lambda: seal_task(header(stage="send_images"), MODEL),
    "evaluate without model": lambda: seal_task(header(stage="evaluate", model=None)),
    "train without model": lambda: seal_task(header(model=None)),
    "a model that no header names": lambda: seal_task(header(model=None), MODEL),
    "another model than named": lambda: seal_task(header(), model_with(first=lambda a: a + 1)),
    "a model in enlist": lambda: seal_task(header(stage="enlist", round=0), MODEL),
    "a missing tensor": lambda: sealed(model_with(first=None)),
    "one more tensor": lambda: sealed(model_with(more=np.zeros(2, np.float32))),
    "another shape": lambda: sealed(model_with(first=lambda a: a[None])),
    "another dtype": lambda: sealed(model_with(first=lambda a: a.astype(np.float64))),
    "round 0": lambda: sealed(MODEL, round=0),
    "a round past the end": lambda: sealed(MODEL, round=PLAN.aggregation.rounds + 1),
    "a release before the end": lambda: sealed(MODEL, stage="release"),
    "a release without model": lambda: seal_task(
        header(stage="release", round=PLAN.aggregation.rounds, model=None)
    ),
    "a list of sites outside enlisting": lambda: sealed(MODEL, roll=ROLL),
    "round 2**62": lambda: sealed(MODEL, round=2**62),
    "a negative round": lambda: sealed(MODEL, round=-1),
    "enlist in a round": lambda: seal_task(header(stage="enlist", model=None)),
    "more attempts than planned": lambda: sealed(MODEL, attempt=PLAN.aggregation.attempts + 1),
    "attempt 0": lambda: sealed(MODEL, attempt=0),
    "an answer": lambda: json.dumps({"kind": "train"}).encode(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(SECRET)


def write_cases(folder: Path) -> Cohort:
    """Two patients of noise, whose names and paths are the secret."""
    rng = np.random.default_rng(0)
    cases = []
    for n, split in enumerate(("train", "val")):
        paths = [folder / f"{SECRET}-{n}-{kind}.nii.gz" for kind in ("image", "label")]
        image = rng.normal(size=(10, 10, 10)).astype(np.float32)
        label = np.zeros((10, 10, 10), np.uint8)
        label[2:5, 2:8, 2:8], label[5:8, 2:8, 2:8] = 1, 2
        for path, array in zip(paths, (image, label), strict=True):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
        case = f"{SECRET}-{n}"
        cases.append(Case(case, f"{SECRET}/{n}", "site_a", split, (paths[0],), paths[1]))  # type: ignore[arg-type]
    return Cohort(site="site_a", cases=tuple(cases))


@pytest.fixture(scope="module")
def cohort(folder: Path) -> Cohort:
    return write_cases(folder)


@pytest.fixture
def trainer(cohort: Cohort, tmp_path: Path) -> Trainer:
    return trainer_of(PLAN, cohort, tmp_path)


def trainer_of(plan: StudyPlan, cohort: Cohort, tmp_path: Path) -> Trainer:
    cache = CaseCache(tmp_path / "cache", plan.task)
    return Trainer(plan, cohort, cache, tmp_path / "site", models=tmp_path / "models")


def code_of(answer: bytes, task: bytes) -> str:
    """The coarse code of a refusal, which is all that the answer holds."""
    said = peek(answer, AnswerHeader, max_bytes=10**7)
    assert said.task == task_digest(task)
    assert said.body.kind == "refused"
    assert len(answer) < 400
    assert SECRET.encode() not in answer
    return said.body.code


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_task_that_is_not_the_plans_is_refused_with_one_word(
    attack: str, trainer: Trainer, tmp_path: Path
) -> None:
    task = ATTACKS[attack]()
    with pytest.raises(TrustError):
        open_task(task, PLAN)
    assert code_of(trainer.handle(task), task) == "task"
    (entry,) = Journal(tmp_path / "site" / "journal.jsonl").read("refused")
    assert entry["code"] == "task"
    assert entry["reason"]
    assert not (tmp_path / "site" / "state").exists()
    assert not (tmp_path / "models").exists()


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_changed_byte_never_brings_another_model_than_the_named_one(
    place: int, change: int
) -> None:
    data = bytearray(GOOD)
    data[place] ^= change
    try:
        opened, model = open_task(bytes(data), PLAN)
    except TrustError:
        return
    assert digest_of(model) == opened.model == PLAN.built.digest
    assert (opened.study, opened.plan) == (PLAN.study, PLAN.digest)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_garbage_never_makes_a_trainer_raise(trainer: Trainer, data: bytes) -> None:
    assert code_of(trainer.handle(data), data) == "task"


def test_a_good_task_is_answered_after_any_attack_and_twice_alike(trainer: Trainer) -> None:
    before = trainer.handle(GOOD)
    for attack in ("garbage", "another model than named", "one more tensor"):
        trainer.handle(ATTACKS[attack]())
    assert trainer.handle(GOOD) == before
    said, delta = open_answer(before, PLAN, task=task_digest(GOOD), stage="train", site="site_a")
    assert said.body.kind == "train"
    assert any(np.any(array) for array in delta.values())


def test_a_released_model_is_stored_ready_for_use(trainer: Trainer, tmp_path: Path) -> None:
    model = model_with(first=lambda array: array + 1)
    task = sealed(model, stage="release", round=PLAN.aggregation.rounds)
    for _ in range(2):
        answer = trainer.handle(task)
        sent = digest_of(model)
        said, _ = open_answer(
            answer, PLAN, task=task_digest(task), stage="release", site="site_a", model=sent
        )
        assert said.body.kind == "release" and said.body.model == sent
        about, stored = load_model(tmp_path / "models" / f"{PLAN.study}.safetensors")
        assert (about.arm, about.rounds, about.plan) == ("federated", 3, PLAN)
        assert digest_of(stored) == sent


def test_a_final_model_is_not_exchanged_afterwards(trainer: Trainer, tmp_path: Path) -> None:
    last = {"stage": "release", "round": PLAN.aggregation.rounds}
    file = tmp_path / "models" / f"{PLAN.study}.safetensors"
    trainer.handle(sealed(MODEL, **last))
    kept = file.read_bytes()
    other = sealed(model_with(first=lambda array: array + 1), **last)
    assert code_of(trainer.handle(other), other) == "task"
    assert file.read_bytes() == kept


@pytest.mark.parametrize("stage", ["enlist", "train", "evaluate", "release"])
def test_no_answer_names_a_patient_a_case_or_a_path(stage: str, trainer: Trainer) -> None:
    enlisting = stage == "enlist"
    round_ = {"enlist": 0, "release": PLAN.aggregation.rounds}.get(stage, 1)
    changes = {"stage": stage, "round": round_}
    task = seal_task(header(**changes, model=None)) if enlisting else sealed(MODEL, **changes)
    answer = trainer.handle(task)
    said = peek(answer, AnswerHeader, max_bytes=10**7)
    assert said.body.kind == stage
    for secret in (SECRET, "0815", "nii", "tmp"):
        assert secret.encode() not in answer


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_model_that_explodes_becomes_one_word(value: float, trainer: Trainer) -> None:
    model = {name: np.full_like(array, value) for name, array in MODEL.items()}
    task = sealed(model)
    assert code_of(trainer.handle(task), task) == "not_finite"


def test_data_that_vanished_become_one_word(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    cohort = write_cases(tmp_path / "gone")
    for path in (tmp_path / "gone").iterdir():
        path.unlink()
    trainer = trainer_of(PLAN, cohort, tmp_path)
    assert code_of(trainer.handle(GOOD), GOOD) == "data"
    (entry,) = Journal(tmp_path / "site" / "journal.jsonl").read("refused")
    assert "cannot be read" in entry["reason"]


def test_a_site_without_training_patients_becomes_one_word(cohort: Cohort, tmp_path: Path) -> None:
    trainer = trainer_of(PLAN, cohort.split("val"), tmp_path)
    assert code_of(trainer.handle(GOOD), GOOD) == "data"


def test_a_site_that_cannot_write_still_answers(cohort: Cohort, tmp_path: Path) -> None:
    (tmp_path / "site").write_text("a file where the site's folder should be")
    trainer = trainer_of(PLAN, cohort, tmp_path)
    assert code_of(trainer.handle(GOOD), GOOD) in {"failed", "not_finite"}
    assert code_of(trainer.handle(b"garbage"), b"garbage") == "task"


def test_a_damaged_optimiser_state_becomes_one_word(trainer: Trainer, tmp_path: Path) -> None:
    trainer.handle(GOOD)
    stored = tmp_path / "site" / "state" / "round-000001.safetensors"
    stored.write_bytes(stored.read_bytes()[:100])
    task = sealed(MODEL, round=2)
    assert code_of(trainer.handle(task), task) == "failed"
