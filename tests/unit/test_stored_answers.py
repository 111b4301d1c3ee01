"""What was answered is answered again; what was begun is never forgotten."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fedseg.errors import StorageError, TrustError
from sites.answers import (
    MOST_KEYS,
    MOST_TASKS,
    PLAIN_ROUNDS_KEPT,
    SEALED_ROUNDS_KEPT,
    Answers,
    Slot,
)

ONE, TWO, THREE = (digit * 64 for digit in "abc")
TRAIN = Slot(1, "train")


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    return Answers(tmp_path / "answers")


def seal(answers: Answers, slot: Slot, about: str, key: str, data: bytes) -> None:
    with answers.sealing(slot, about, key) as file:
        file.write(data)


def test_a_sealed_answer_is_found_by_stage_task_and_receiving_key(answers: Answers) -> None:
    seal(answers, TRAIN, ONE, "key", b"sealed")
    path = answers.sealed(TRAIN, ONE, "key")
    assert path is not None
    assert path.read_bytes() == b"sealed"
    assert path.stat().st_mode & 0o777 == 0o600
    assert answers.sealed(TRAIN, ONE, "other key") is None
    assert answers.sealed(TRAIN, TWO, "key") is None
    assert answers.sealed(Slot(2, "train"), ONE, "key") is None
    assert answers.sealed(Slot(1, "evaluate"), ONE, "key") is None


def test_another_task_is_begun_only_as_often_as_the_plan_has_attempts(answers: Answers) -> None:
    answers.begin(TRAIN, ONE, attempts=2)
    answers.begin(TRAIN, TWO, attempts=2)
    for known in (ONE, TWO):
        answers.begin(TRAIN, known, attempts=2)
    with pytest.raises(TrustError, match="attempts"):
        answers.begin(TRAIN, THREE, attempts=2)
    assert answers.begun(TRAIN) == {ONE: ONE, TWO: TWO}
    answers.begin(Slot(1, "evaluate"), THREE, attempts=2)
    answers.begin(Slot(2, "train"), THREE, attempts=2)


def test_an_attempt_that_is_asked_for_in_other_words_is_no_attempt_more(answers: Answers) -> None:
    for number in range(MOST_TASKS):
        answers.begin(TRAIN, f"{number:064d}", attempts=1, attempt=ONE)
    for about, attempt in ((TWO, ONE), (TWO, THREE)):
        with pytest.raises(TrustError, match=r"ever new tasks|attempts"):
            answers.begin(TRAIN, about, attempts=1, attempt=attempt)
    answers.begin(TRAIN, f"{0:064d}", attempts=1, attempt=ONE)


def test_what_was_begun_outlives_the_process(answers: Answers, tmp_path: Path) -> None:
    answers.begin(TRAIN, ONE, attempts=1)
    with pytest.raises(TrustError):
        Answers(tmp_path / "answers").begin(TRAIN, TWO, attempts=1)


def test_an_answer_that_was_not_written_whole_is_none(answers: Answers) -> None:
    with pytest.raises(StorageError, match="make room"), answers.sealing(TRAIN, ONE, "k") as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ValueError), answers.sealing(TRAIN, ONE, "k") as file:
        file.write(b"half")
        raise ValueError
    assert answers.sealed(TRAIN, ONE, "k") is None


def test_old_answers_are_cleared_and_their_tasks_never_worked_on_again(answers: Answers) -> None:
    for round_ in range(1, PLAIN_ROUNDS_KEPT + 3):
        slot = Slot(round_, "train")
        answers.begin(slot, ONE, attempts=1)
        answers.keep(slot, ONE, b"plain")
        seal(answers, slot, ONE, "k", b"sealed")
    last = PLAIN_ROUNDS_KEPT + 2
    answers.begin(Slot(last, "evaluate"), ONE, attempts=1)
    plain = [r for r in range(1, last + 1) if answers.plain(Slot(r, "train"), ONE) is not None]
    sealed = [r for r in range(1, last + 1) if answers.sealed(Slot(r, "train"), ONE, "k")]
    assert plain == list(range(3, last + 1))
    assert sealed == list(range(last - SEALED_ROUNDS_KEPT + 1, last + 1))
    assert answers.last == Slot(last, "evaluate")
    for about in (ONE, TWO):
        with pytest.raises(TrustError):
            answers.begin(TRAIN, about, attempts=5)


def test_what_a_power_cut_left_half_written_is_cleared_with_the_rest(
    answers: Answers, tmp_path: Path
) -> None:
    answers.begin(TRAIN, ONE, attempts=1)
    for kind in ("plain", "sealed"):
        (tmp_path / "answers" / TRAIN.name / f"{ONE}.{kind}.part").write_bytes(b"half an update")
    answers.begin(Slot(1 + PLAIN_ROUNDS_KEPT, "train"), ONE, attempts=1)
    left = [path.name for path in (tmp_path / "answers" / TRAIN.name).iterdir()]
    assert left == [f"{ONE}.begun"]


def test_ever_new_receiving_keys_do_not_fill_the_disk(answers: Answers) -> None:
    for number in range(MOST_KEYS):
        seal(answers, TRAIN, ONE, f"key {number}", b"sealed")
    with pytest.raises(TrustError, match="ever new keys"):
        seal(answers, TRAIN, ONE, "one more", b"sealed")
    assert answers.sealed(TRAIN, ONE, "key 0") is not None
    seal(answers, TRAIN, TWO, "key", b"sealed")
