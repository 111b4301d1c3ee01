"""The ledger among real processes: they race, and they are killed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import spending
from small_ledgers import LIMITS, created, patient, registered, reopened, study

from fedseg.errors import PrivacyError
from fedseg.privacy.accounting import PrivacyFilter

ROUNDS = 6


def forked(work: Callable[[], None]) -> int:
    """Run work in a child; what it prints is dropped."""
    child = os.fork()
    if child:
        return child
    with suppress(BaseException):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        os._exit(0)
    os._exit(1)


def prepared(folder: Path, rounds: int = ROUNDS) -> None:
    registered(created(folder), study(rounds=rounds))


def test_two_processes_cannot_overspend(tmp_path: Path) -> None:
    prepared(tmp_path)
    children = [forked(lambda n=name: spending.main(tmp_path, n, ROUNDS)) for name in "ab"]
    time.sleep(0.3)
    (tmp_path / "go").touch()
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0, 0]
    book = reopened(tmp_path).book
    assert len(book.debits) == ROUNDS and all(d.answer for d in book.debits.values())
    sent = [line for name in "ab" for line in _sent(tmp_path, name)]
    assert len(sent) == ROUNDS


def test_one_task_in_two_processes_has_one_answer(tmp_path: Path) -> None:
    prepared(tmp_path)

    def commit(text: str) -> None:
        ledger = reopened(tmp_path)
        ledger.reserve(spending.digest("1"), "liver", "train", spending.STEP, LIMITS)
        ledger.commit(spending.digest("1"), spending.digest(text))

    children = [forked(lambda t=text: commit(t)) for text in "abcd"]
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children)
    assert codes == [0, 1, 1, 1]
    book = reopened(tmp_path).book
    assert len(book.debits) == 1


def killed_until_done(folder: Path, seed: int, kills: int) -> int:
    """Work until all is done, killed again and again; how many kills met a living process."""
    random = Random(seed)
    (folder / "go").touch()
    met = 0
    for attempt in range(kills + 1):
        point = random.randrange(1, 140)
        child = forked(lambda p=point, a=attempt: _dying(folder, p if a < kills else None))
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            met += 1
            assert os.WTERMSIG(status) == signal.SIGKILL
        else:
            assert os.WEXITSTATUS(status) == 0
        reopened(folder)  # verified against the audit after every kill
    return met


def _dying(folder: Path, point: int | None) -> None:
    """Spend, and be killed before a seeded line of the ledger, its witness or the spender."""
    if point is not None:
        left = [point]
        files = ("store.py", "witness.py", "chain.py", "spending.py", "container.py")

        def trace(frame: object, event: str, _: object) -> Callable[..., object] | None:
            name = frame.f_code.co_filename  # type: ignore[attr-defined]
            if not name.endswith(files) or frame.f_code.co_name == "verify_chain":  # type: ignore[attr-defined]
                return None
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        ledger = spending.reopened
        sys.setprofile(None)

        def begin(place: Path) -> object:
            found = ledger(place)
            threading.settrace(None)  # type: ignore[arg-type]
            sys.settrace(trace)
            return found

        spending.reopened = begin  # type: ignore[assignment]
    spending.main(folder, "k", ROUNDS)


def _sent(folder: Path, name: str) -> list[str]:
    place = folder / f"sent-{name}"
    return place.read_text().splitlines() if place.exists() else []


def check_kills(folder: Path, seeds: range, kills: int) -> int:
    met = 0
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        prepared(place)
        met += killed_until_done(place, seed, kills)
        book = reopened(place).book
        rule = PrivacyFilter(LIMITS.total_epsilon, LIMITS.total_delta, book.order)
        assert len(book.debits) == ROUNDS
        charged = book.charges(patient(0))
        assert charged == (spending.STEP.model_copy(update={"steps": ROUNDS * 5}),)
        assert rule.room(rule.cost(charged))
        answers: dict[str, set[str]] = {}
        for line in _sent(place, "k"):
            task, answer = line.split()
            answers.setdefault(task, set()).add(answer)
            assert spending.digest(task) in book.debits, "an answer without a debit"
        assert len(answers) == ROUNDS
        assert all(len(found) == 1 for found in answers.values()), "two answers for one task"
    return met


def test_kills_lose_no_debit_and_give_no_second_answer(tmp_path: Path) -> None:
    assert check_kills(tmp_path, range(4), kills=5) >= 10


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    assert check_kills(tmp_path, range(100, 140), kills=6) >= 200


def test_work_beyond_the_schedule_is_refused_in_any_process(tmp_path: Path) -> None:
    prepared(tmp_path, rounds=1)
    ledger = reopened(tmp_path)
    ledger.reserve(spending.digest("1"), "liver", "train", spending.STEP, LIMITS)
    with pytest.raises(PrivacyError):
        reopened(tmp_path).reserve(spending.digest("2"), "liver", "train", spending.STEP, LIMITS)
