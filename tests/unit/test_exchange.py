"""Sealed tasks and answers: what is stored before it is sent, what counts, what is destroyed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory_grid import SealedSite, seal_answer_of, sha256
from pure_studies import reply
from small_parties import Party, roll_of
from small_plans import built_plan, tiny_model

from coordinator.sealing.exchange import SealedExchange
from fedseg.aggregation.rounds import (
    ENLIST,
    Position,
    StudyState,
    enlist_task,
    first_state,
    open_stage,
)
from fedseg.errors import RoundError, StorageError, TrustError
from fedseg.security.identity import Revoked, sign_roll
from fedseg.security.keys import SigningKey
from fedseg.updates import AnswerError

PLAN = built_plan()
A, B, C = (Party(f"site_{name}") for name in "abc")
TRAIN = Position(round=1, stage="train")
TASK = open_stage(StudyState(TRAIN, first_state(PLAN, tiny_model()).server), PLAN)


class Coordinator:
    """A study's registry, outbox and key; `exchange()` is the coordinator started anew."""

    def __init__(self, folder: Path) -> None:
        self.key = SigningKey.generate()
        self.registry, self.outbox = folder / "registry.json", folder / "outbox"
        self.enrol(A, B, C)

    def enrol(self, *parties: Party, version: int = 1, **changes: Any) -> None:
        signed = sign_roll(roll_of(*parties, version=version, **changes), self.key)
        self.registry.write_bytes(signed.canonical_bytes)

    def exchange(self) -> SealedExchange:
        made = SealedExchange(PLAN, self.key, registry=self.registry, outbox=self.outbox)
        made.adopt()
        return made

    def site(self, party: Party) -> SealedSite:
        answer = lambda task: reply(task, party.name, PLAN)  # noqa: E731
        return SealedSite(party, PLAN, self.key.public, answer)

    def files(self) -> set[str]:
        return {path.name for path in self.outbox.iterdir()} if self.outbox.exists() else set()


@pytest.fixture
def study(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path)


def code_of(exchange: SealedExchange, data: bytes) -> str:
    with pytest.raises(AnswerError) as caught:
        exchange.open(data)
    return caught.value.code


def test_every_site_reads_the_task_and_its_answer_comes_with_its_name(study: Coordinator) -> None:
    exchange = study.exchange()
    envelope = exchange.seal(TRAIN, TASK)
    assert len(envelope) < len(TASK) + 3 * 2048 + 4096
    for party in (A, B, C):
        site = study.site(party)
        signer, plain = exchange.open(site(envelope))
        assert (signer, bytes(plain)) == (party.name, reply(TASK, party.name, PLAN))
        assert site.worked == [sha256(TASK)]


def test_a_task_is_on_disk_before_it_is_given_out_and_the_same_after_a_crash(
    study: Coordinator,
) -> None:
    envelope = study.exchange().seal(TRAIN, TASK)
    assert (study.outbox / "000001-train-1.task").read_bytes() == envelope
    assert {p.stat().st_mode & 0o777 for p in study.outbox.iterdir()} == {0o600}
    assert study.outbox.stat().st_mode & 0o777 == 0o700
    answer = study.site(A)(envelope)
    again = study.exchange()
    assert again.seal(TRAIN, TASK) == envelope
    assert again.open(answer)[0] == "site_a"


def test_a_draft_that_a_crash_left_is_not_sent(study: Coordinator) -> None:
    study.outbox.mkdir(mode=0o700)
    (study.outbox / "000001-train-1.task.part").write_bytes(b"half")
    (study.outbox / "000001-train-1.task").write_bytes(b"torn by a bad disk")
    exchange = study.exchange()
    assert exchange.open(study.site(B)(exchange.seal(TRAIN, TASK)))[0] == "site_b"


def test_a_stage_has_one_receiving_key_through_all_attempts(study: Coordinator) -> None:
    exchange, site = study.exchange(), study.site(A)
    second = TRAIN.model_copy(update={"attempt": 2})
    site(exchange.seal(TRAIN, TASK))
    header_two = TASK.replace(b'\\"attempt\\":1', b'\\"attempt\\":2')
    assert header_two != TASK
    site(exchange.seal(second, header_two))
    assert len(set(site.reply_to)) == 1
    evaluate = Position(round=1, stage="evaluate")
    site(exchange.seal(evaluate, open_stage(_at(evaluate), PLAN)))
    assert len(set(site.reply_to)) == 2


def _at(position: Position) -> StudyState:
    return StudyState(position, first_state(PLAN, tiny_model()).server)


def test_a_closed_stage_leaves_no_key_and_no_task(study: Coordinator) -> None:
    exchange = study.exchange()
    exchange.seal(TRAIN, TASK)
    key, other = study.outbox / "000001-train.key", study.outbox.parent / "same file"
    os.link(key, other)
    assert b"receiving" in other.read_bytes()
    exchange.closed(TRAIN)
    assert study.files() == set()
    assert set(other.read_bytes()) == {0}
    exchange.closed(TRAIN)


def test_an_answer_that_comes_after_the_close_cannot_be_opened_by_anybody(
    study: Coordinator,
) -> None:
    exchange = study.exchange()
    envelope = exchange.seal(TRAIN, TASK)
    late = study.site(A)(envelope)
    exchange.closed(TRAIN)
    assert code_of(exchange, late) == "stale"
    evaluate = Position(round=1, stage="evaluate")
    exchange.seal(evaluate, open_stage(_at(evaluate), PLAN))
    assert code_of(exchange, late) == "stale"
    again = study.exchange()
    assert again.seal(TRAIN, TASK) != envelope
    assert code_of(again, late) == "signature"


def test_enlisting_again_keeps_the_task_of_the_open_stage(study: Coordinator) -> None:
    exchange = study.exchange()
    envelope = exchange.seal(TRAIN, TASK)
    again = study.exchange()
    again.seal(ENLIST, enlist_task(PLAN, again.adopt()))
    again.closed(ENLIST)
    assert again.seal(TRAIN, TASK) == envelope


def test_what_a_crash_left_of_another_stage_is_destroyed(study: Coordinator) -> None:
    exchange = study.exchange()
    exchange.seal(ENLIST, enlist_task(PLAN))
    exchange.seal(TRAIN, TASK)
    (study.outbox / ".000000-enlist.key.0a1b2c3d").write_bytes(b"the draft of a key")
    evaluate = Position(round=1, stage="evaluate")
    study.exchange().seal(evaluate, open_stage(_at(evaluate), PLAN))
    assert study.files() == {"000001-evaluate.key", "000001-evaluate-1.task"}


@pytest.mark.parametrize("damage", [lambda data: bytes(len(data)), lambda data: data[:20]])
def test_a_key_that_was_half_destroyed_is_replaced(
    study: Coordinator, damage: Callable[[bytes], bytes]
) -> None:
    envelope = study.exchange().seal(TRAIN, TASK)
    key = study.outbox / "000001-train.key"
    key.write_bytes(damage(key.read_bytes()))
    exchange, site = study.exchange(), study.site(A)
    assert site(envelope)
    assert exchange.open(site(exchange.seal(TRAIN, TASK)))[0] == "site_a"
    assert site.worked == [sha256(TASK)]
    assert len(set(site.reply_to)) == 2


def test_a_changed_roll_is_sealed_for_under_the_same_receiving_key(study: Coordinator) -> None:
    first = study.exchange().seal(TRAIN, TASK)
    late = Party("site_d")
    gone = (Revoked(name=B.name, signing=B.signing.public.text),)
    study.enrol(A, C, late, version=2, revoked=gone)
    exchange, old = study.exchange(), study.site(A)
    second = exchange.seal(TRAIN, TASK)
    assert second != first
    for envelope in (first, second):
        assert exchange.open(old(envelope))[0] == "site_a"
    assert (len(set(old.reply_to)), len(old.worked)) == (1, 1)
    assert exchange.open(study.site(late)(second))[0] == "site_d"
    with pytest.raises(TrustError, match="not sealed for"):
        study.site(B)(second)


def test_the_roll_in_force_is_the_one_that_was_adopted(study: Coordinator) -> None:
    exchange = study.exchange()
    assert (exchange.changed(), exchange.sites) == (False, ("site_a", "site_b", "site_c"))
    study.enrol(A, B, version=2)
    assert exchange.changed()
    assert exchange.sites == ("site_a", "site_b", "site_c")
    assert exchange.adopt().roll.version == 2
    assert (exchange.changed(), exchange.sites) == (False, ("site_a", "site_b"))


def test_who_was_revoked_a_moment_ago_is_refused(study: Coordinator) -> None:
    exchange = study.exchange()
    answer = study.site(B)(exchange.seal(TRAIN, TASK))
    gone = (Revoked(name=B.name, signing=B.signing.public.text),)
    study.enrol(A, C, version=2, revoked=gone)
    assert code_of(exchange, answer) == "site"
    assert code_of(study.exchange(), answer) == "stale"


@pytest.mark.parametrize("act", ["older", "stranger", "garbage", "missing"])
def test_a_registry_that_is_not_the_studys_stops_the_run(study: Coordinator, act: str) -> None:
    study.enrol(A, B, C, version=5)
    exchange = study.exchange()
    if act == "older":
        study.enrol(A, B, C, version=4)
    elif act == "stranger":
        signed = sign_roll(roll_of(A, version=9), SigningKey.generate())
        study.registry.write_bytes(signed.canonical_bytes)
    elif act == "garbage":
        study.registry.write_bytes(b"garbage")
    else:
        study.registry.unlink()
    with pytest.raises(TrustError):
        exchange.changed()


def test_nothing_is_sealed_for_nobody(study: Coordinator) -> None:
    study.enrol(version=2)
    with pytest.raises(RoundError, match="no site is enrolled"):
        study.exchange().seal(TRAIN, TASK)


def test_a_task_that_cannot_be_stored_is_not_sent(study: Coordinator) -> None:
    exchange = study.exchange()
    study.outbox.mkdir()
    (study.outbox / "000001-train-1.task.part").mkdir()
    with pytest.raises(StorageError, match="not sent"):
        exchange.seal(TRAIN, TASK)


def _flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


Forge = Callable[[Coordinator, bytes, bytes], bytes]
FORGED: dict[str, tuple[Forge, str]] = {
    "nothing": (lambda _s, _t, _a: b"", "malformed"),
    "garbage": (lambda _s, _t, _a: b"garbage" * 99, "malformed"),
    "a plain answer": (lambda _s, _t, _a: reply(TASK, "site_a", PLAN), "malformed"),
    "the task itself": (lambda _s, task, _a: task, "malformed"),
    "another study": (lambda _s, t, a: seal_answer_of(t, a, A, study="other"), "malformed"),
    "another plan": (lambda _s, t, a: seal_answer_of(t, a, A, plan="0" * 64), "malformed"),
    "oversized": (lambda _s, t, _a: seal_answer_of(t, bytes(2**22), A), "malformed"),
    "sealed for others": (
        lambda _s, t, a: seal_answer_of(t, a, A, recipients={"site_b": B.receiving.public}),
        "malformed",
    ),
    "another task": (lambda _s, t, a: seal_answer_of(t, a, A, about="0" * 64), "stale"),
    "a stranger": (lambda _s, t, a: seal_answer_of(t, a, Party("site_x")), "site"),
    "somebody else's name": (
        lambda _s, t, a: seal_answer_of(t, a, B, sender="site_a"),
        "signature",
    ),
    "the study key": (lambda s, t, a: seal_answer_of(t, a, A, signer=s.key), "signature"),
    "another receiving key": (
        lambda _s, t, a: seal_answer_of(t, a, A, recipients={"coordinator": B.receiving.public}),
        "signature",
    ),
    "a changed byte": (lambda _s, t, a: _flipped(seal_answer_of(t, a, A), -20), "signature"),
    "cut short": (lambda _s, t, a: seal_answer_of(t, a, A)[:-1], "signature"),
    "longer": (lambda _s, t, a: seal_answer_of(t, a, A) + b"x", "signature"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_is_not_a_sites_own_answer_is_refused_with_a_code(
    study: Coordinator, name: str
) -> None:
    exchange = study.exchange()
    task = exchange.seal(TRAIN, TASK)
    forge, code = FORGED[name]
    assert code_of(exchange, forge(study, task, reply(TASK, "site_a", PLAN))) == code
    assert exchange.open(study.site(A)(task))[0] == "site_a"


def test_a_program_that_did_not_adopt_a_roll_is_told_so(study: Coordinator) -> None:
    made = SealedExchange(PLAN, study.key, registry=study.registry, outbox=study.outbox)
    with pytest.raises(ValueError, match="adopt"):
        made.seal(TRAIN, TASK)
