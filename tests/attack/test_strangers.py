"""What reaches a trainer that should not, and what the site does when its own disk or power fails.

Nothing here is simulated but the disk's lack of room: real keys, envelopes, folders and training.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_hospitals import (
    NAME,
    Consortium,
    Hospital,
    fixture_data,  # noqa: F401
    fixture_founded,  # noqa: F401
    fixture_site,  # noqa: F401
)
from small_parties import Party

from fedseg.errors import StorageError
from fedseg.security.keys import ReceivingKey, SealingKey, SigningKey
from fedseg.updates import task_limit
from sites.admission import StrangerError
from sites.answers import Answers
from sites.chronicle import SINGLY
from sites.gate import FloodError, Gate
from sites.outbox import Outbox
from sites.trainer import Trainer


@pytest.fixture
def fuzzed(site: Hospital) -> tuple[Hospital, Gate, bytes]:
    """A hospital with its gate, and a good task."""
    return site, site.gate(), site.task()


def nothing_happened(site: Hospital) -> bool:
    """No training, no answer, nothing begun, nothing left in the spool."""
    answers = list(site.folder.answers("tiny").rglob("*.*"))
    return not site.trained and not answers and not list(site.folder.spool("tiny").glob("*"))


def sealed_for(party: Party) -> dict[str, Any]:
    return {"recipients": {NAME: party.receiving.public}}


STRANGERS: dict[str, Callable[[Hospital], bytes]] = {
    "nothing": lambda _: b"",
    "garbage": lambda _: b"\xff" * 5000,
    "a claimed header of 4 GB": lambda site: site.task()[:8] + b"\xff" * 4 + b"{}",
    "signed by another key": lambda site: site.task(signer=SigningKey.generate()),
    "signed by the site's own key": lambda site: site.task(signer=site.signing),
    "of another study": lambda site: site.task(study="other"),
    "an answer": lambda site: site.task(kind="answer", sender=NAME, reply_to=None),
    "sealed for another site": lambda site: site.task(
        recipients={"hospital_b": Party("hospital_b").receiving.public}
    ),
    "sealed for our name with another key": lambda site: site.task(**sealed_for(Party(NAME))),
    "without a key to answer to": lambda site: site.task(reply_to=None),
    "cut short": lambda site: site.task()[:-1],
    "cut in the header": lambda site: site.task()[:300],
    "longer": lambda site: site.task() + b"x",
    "a changed byte": lambda site: site.task()[:-40] + b"\0" + site.task()[-39:],
    "larger than any task": lambda site: site.task(
        plain=bytes(task_limit(site.consortium.plan) + 1)
    ),
}


@pytest.mark.parametrize("attack", STRANGERS)
def test_what_the_study_did_not_send_gets_no_answer(attack: str, site: Hospital) -> None:
    envelope = STRANGERS[attack](site)
    with pytest.raises(StrangerError):
        site.ask(envelope)
    assert nothing_happened(site)
    (entry,) = site.audited("refused")
    assert entry.facts["code"] == "stranger"
    assert entry.facts["reason"]


REFUSED: dict[str, tuple[str, Callable[[Hospital], bytes]]] = {
    "another plan": ("plan", lambda site: site.task(plan="0" * 64)),
    "another list of sites": (
        "roster",
        lambda site: site.task(
            under=site.consortium.roll(site.own, Party("hospital_b").identity, version=2)
        ),
    ),
    "another list with the same version": (
        "roster",
        lambda site: _enlisting(site, site.consortium.roll(site.own, Party("hospital_b").identity)),
    ),
    "a list without this site": (
        "roster",
        lambda site: _enlisting(
            site, site.consortium.roll(Party("hospital_b").identity, version=2)
        ),
    ),
    "a list with another key of ours": (
        "roster",
        lambda site: _enlisting(site, site.consortium.roll(Party(NAME).identity, version=2)),
    ),
    "a list that another study signed": (
        "task",
        lambda site: _enlisting(
            site, Consortium(site.consortium.plan, {}).roll(site.own, version=2)
        ),
    ),
    "a round that the plan has not": ("task", lambda site: site.task(round_=10**6)),
    "an attempt that the plan has not": (
        "task",
        lambda site: site.task(plain=site.consortium.plain("train", 1, attempt=3)),
    ),
    "garbage from the consortium": ("task", lambda site: site.task(plain=b"\xff" * 3000)),
}


def _enlisting(site: Hospital, roll: Any) -> bytes:
    return site.task(plain=site.consortium.plain("enlist", 0, roll=roll), under=roll)


@pytest.mark.parametrize("attack", REFUSED)
def test_what_was_not_approved_is_refused_with_one_word(attack: str, site: Hospital) -> None:
    code, make = REFUSED[attack]
    answer = site.ask(make(site))
    assert site.code(answer) == code
    assert nothing_happened(site)
    (entry,) = site.audited("refused")
    assert (entry.facts["code"], entry.facts["study"]) == (code, "tiny")
    reason = str(entry.facts["reason"])
    assert reason.encode() not in site.consortium.read(answer, site.own)
    assert str(site.folder.path) not in reason


def test_a_plan_that_nobody_approved_is_refused(site: Hospital) -> None:
    site.folder.approval("tiny").unlink()
    assert site.code(site.ask(site.task())) == "plan"
    assert nothing_happened(site)


@pytest.mark.parametrize("file", ["approval", "cohort", "roll"])
def test_an_edited_file_stops_all_work(file: str, site: Hospital) -> None:
    path = getattr(site.folder, file)("tiny")
    text = path.read_text()
    digits = "".join(str((int(c) + 1) % 10) if c.isdigit() else c for c in text)
    path.write_text(digits)
    assert site.code(site.ask(site.task())) in {"task", "data"}
    assert not site.trained
    assert not list(site.folder.answers("tiny").rglob("*.sealed"))


def test_a_replayed_task_trains_nothing_however_often_and_cannot_fill_the_audit(
    site: Hospital,
) -> None:
    envelope, gate = site.task(), site.gate()
    first = site.ask(envelope, gate)
    assert isinstance(first, Path)
    for _ in range(SINGLY):
        assert site.ask(envelope, gate) == first
    for _ in range(20):
        with pytest.raises(FloodError):  # what has no entry of its own does not leave
            site.ask(envelope, gate)
    with pytest.raises(StrangerError):
        site.ask(b"garbage", gate)
    assert site.trained == 1
    assert len(site.audited("answered")) == 1
    assert len(site.audited("repeated")) == SINGLY
    assert len(site.audited("egress")) == 1 + SINGLY


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_is_answered(
    fuzzed: tuple[Hospital, Gate, bytes], data: st.DataObject
) -> None:
    site, gate, good = fuzzed
    envelope = bytearray(good)
    place = data.draw(st.integers(0, len(envelope) - 1))
    kind = data.draw(st.sampled_from(("change", "cut", "insert")))
    if kind == "change":
        envelope[place] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del envelope[place : place + data.draw(st.integers(1, 5000))]
    else:
        envelope[place:place] = data.draw(st.binary(min_size=1, max_size=50))
    with pytest.raises(StrangerError):
        site.ask(bytes(envelope), gate)
    assert not site.trained


@contextmanager
def full_disk(kind: str) -> Iterator[None]:
    """No room for files of one kind."""
    opened = os.open

    def refusing(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith(f"{kind}.part"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, *args, **options)

    with patch("os.open", refusing):
        yield


@pytest.mark.parametrize("kind", ["begun", "plain", "sealed"])
def test_a_full_disk_is_a_refusal_and_nothing_is_served(kind: str, site: Hospital) -> None:
    gate = site.gate()
    with full_disk(kind):
        assert site.code(site.ask(site.task(), gate)) == "failed"
    assert not list(site.folder.answers("tiny").rglob(f"*.{kind}"))
    assert site.audited("refused")[0].facts["code"] == "failed"
    assert not site.audited("answered")
    trained = site.trained
    assert trained == (0 if kind == "begun" else 1)
    assert site.said(site.ask(site.task(), gate)).body.kind == "train"
    assert site.trained == trained + (0 if kind == "sealed" else 1)


def test_nothing_leaves_that_cannot_be_recorded(site: Hospital) -> None:
    gate = site.gate()
    with full_disk("audit.head"), pytest.raises(StorageError):
        site.ask(site.task(), gate)
    assert not list(site.folder.answers("tiny").rglob("*.sealed"))
    assert site.said(site.ask(site.task(), gate)).body.kind == "train"


def _die_after(site: Hospital, owner: type, method: str) -> None:
    """Answer a task in a process that is killed once a method has returned."""
    original = getattr(owner, method)

    def dying(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        return found

    with patch.object(owner, method, dying):
        site.ask(site.task())


CRASHES = {
    "before the work": (Answers, "begin", 0, 1),
    "between training and the store": (Trainer, "handle", 1, 2),
    "between the store and the reply": (Answers, "keep", 1, 1),
    "while it seals": (Outbox, "_seal", 1, 1),
}


@pytest.mark.parametrize("moment", CRASHES)
def test_a_kill_costs_at_most_the_open_work(moment: str, site: Hospital) -> None:
    owner, method, before, after = CRASHES[moment]
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_die_after, args=(site, owner, method))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert site.trained == before
    assert site.said(site.ask(site.task())).body.kind == "train"
    assert site.trained == after
    plain = site.consortium.plain("train", 1, attempt=2)
    assert site.said(site.ask(site.task(plain=plain))).body.kind == "train"


def test_a_weak_reply_key_is_a_strangers(site: Hospital) -> None:
    class Weak(SealingKey):
        @property
        def text(self) -> str:
            return "AAAA"

    with pytest.raises(StrangerError):
        site.ask(site.task(reply_to=Weak(ReceivingKey.generate().public.raw)))
    assert nothing_happened(site)
