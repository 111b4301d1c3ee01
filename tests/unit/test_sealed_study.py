"""A sealed study over a Grid in memory: crashes, lost tasks, late and returning sites, a pause."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    validate_object_content,
)
from memory_grid import Kept, MemoryGrid, SealedSite, Site, Time
from pure_studies import SITES, reply, run_purely
from small_parties import Party, roll_of
from small_plans import answer, body_of, built_plan, tiny_model

from coordinator.rounds.asking import UNREADABLE
from coordinator.rounds.events import (
    Event,
    Paused,
    Resumed,
    SiteFailed,
    StageClosed,
    StageOpened,
    nobody,
)
from coordinator.rounds.study import Study
from coordinator.sealing.exchange import SealedExchange
from fedseg.aggregation.rounds import Position, StudyState, first_state
from fedseg.arrays import digest_of
from fedseg.carriage import BUSY
from fedseg.security.identity import Revoked, sign_roll
from fedseg.security.keys import SigningKey
from fedseg.updates import Refused, TaskHeader, open_task, peek, task_digest

PLAN = built_plan()
START = first_state(PLAN, tiny_model())
UNDISTURBED = run_purely(START, PLAN)[-1]


class CrashError(RuntimeError):
    """The coordinator's process dies here."""


class Hospitals:
    """Sites with keys, their registry, and a coordinator that can be started again and again."""

    def __init__(self, folder: Path) -> None:
        self.key = SigningKey.generate()
        self.registry, self.outbox = folder / "registry.json", folder / "outbox"
        self.time, self.kept = Time(), Kept()
        self.sites: dict[str, SealedSite] = {}
        self.grid = MemoryGrid({}, self.time)
        self.version = 0
        self.events: list[Event] = []
        for node, name in enumerate(SITES, start=11):
            self.grid.sites[node] = self.site(name)
        self.enrol()

    def site(self, name: str) -> SealedSite:
        self.sites[name] = SealedSite(
            Party(name), PLAN, self.key.public, lambda task: reply(task, name, PLAN)
        )
        return self.sites[name]

    def enrol(self, *revoked: str) -> None:
        self.version += 1
        there = [site.party for name, site in self.sites.items() if name not in revoked]
        gone = tuple(
            Revoked(name=name, signing=self.sites[name].party.signing.public.text)
            for name in revoked
        )
        signed = sign_roll(roll_of(*there, version=self.version, revoked=gone), self.key)
        self.registry.write_bytes(signed.canonical_bytes)

    def study(self, **options: Any) -> Study:
        exchange = SealedExchange(PLAN, self.key, registry=self.registry, outbox=self.outbox)
        settings = {"nodes": 3, "reask": True, "observe": self.events.append} | options
        return Study(
            self.grid, PLAN, self.kept, clock=self.time.clock, exchange=exchange, **settings
        )

    def run(self, state: StudyState = START, **options: Any) -> StudyState:
        return self.study(**options).run(state)

    def only_in(self, stage: str, fault: Site, name: str, round_: int | None = None) -> Site:
        """A site whose envelopes meet a fault in one stage; the fault gets the envelope."""
        good = self.sites[name]

        def answer_(envelope: bytes) -> Any:
            opened = self._opened()
            due = opened.stage == stage and round_ in (None, opened.round)
            return fault(envelope) if due else good(envelope)

        return answer_

    def _opened(self) -> StageOpened:
        return [event for event in self.events if isinstance(event, StageOpened)][-1]

    def left(self) -> set[str]:
        return {path.name for path in self.outbox.iterdir()}


@pytest.fixture
def hospitals(tmp_path: Path) -> Hospitals:
    return Hospitals(tmp_path)


def failures(state: StudyState) -> list[tuple[int, str, str, str]]:
    return [(r.round, r.stage, f.site, f.code) for r in state.history for f in r.failures]


def model_of(state: StudyState) -> str:
    return digest_of(state.server.model)


def test_a_sealed_study_ends_with_the_bits_of_the_open_one_and_leaves_no_key(
    hospitals: Hospitals,
) -> None:
    last = hospitals.run()
    assert (last.position, failures(last)) == (None, [])
    assert model_of(last) == model_of(UNDISTURBED)
    assert hospitals.left() == set()
    assert all(len(site.worked) == 7 for site in hospitals.sites.values())


def test_enlisting_tells_the_sites_who_takes_part(hospitals: Hospitals) -> None:
    seen = []
    for name, site in hospitals.sites.items():

        def look(task: bytes, name: str = name) -> bytes:
            seen.append(open_task(task, PLAN)[0])
            return reply(task, name, PLAN)

        site.reply = look
    hospitals.run()
    for header in seen:
        assert (header.roll is not None) == (header.stage == "enlist")
    assert seen[0].roll is not None
    assert [site.name for site in seen[0].roll.roll.sites] == list(SITES)


def test_events_name_the_task_and_the_answers_as_they_travelled(hospitals: Hospitals) -> None:
    hospitals.run()
    opened = [e for e in hospitals.events if isinstance(e, StageOpened)]
    assert [e.digest for e in opened] == hospitals.sites["site_a"].worked
    assert [e.size for e in opened] == [len(task) for _, task in hospitals.grid.tasks[::3]]


class DyingGrid(MemoryGrid):
    """Dies as a task of a position is handed over: before anything is sent, or after all is."""

    def __init__(self, whole: MemoryGrid, hospitals: Hospitals, when: str, at: int) -> None:
        super().__init__(whole.sites, whole.time)
        self.hospitals, self.when, self.at = hospitals, when, at

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        opened = [e for e in self.hospitals.events if isinstance(e, StageOpened)]
        dying = len(opened) == self.at
        if dying and self.when == "before":
            raise CrashError
        pushed = super().push_messages(messages)
        if dying:
            raise CrashError
        return pushed


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", range(1, 8))
def test_a_crash_around_the_sending_sends_the_same_bytes_again_and_trains_nobody_twice(
    hospitals: Hospitals, when: str, stage: int
) -> None:
    whole = hospitals.grid
    hospitals.grid = DyingGrid(whole, hospitals, when, stage)
    with pytest.raises(CrashError):
        hospitals.run()
    first = hospitals.events[-1]
    assert isinstance(first, StageOpened)
    stored = {path.name: path.read_bytes() for path in hospitals.outbox.iterdir()}
    hospitals.grid = whole
    state = hospitals.kept.states[-1] if hospitals.kept.states else START
    last = hospitals.run(state)
    assert model_of(last) == model_of(UNDISTURBED)
    task = stored[f"{first.round:06d}-{first.stage}-1.task"]
    assert [sent for _, sent in whole.tasks].count(task) == 3
    for site in hospitals.sites.values():
        assert len(set(site.worked)) == len(site.worked) == 7


def test_a_crash_after_the_close_leaves_a_key_that_the_next_start_destroys(
    hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    for closed in range(1, 8):

        def die(state: StudyState, closed: int = closed) -> None:
            hospitals.kept.states.append(state)
            if len(state.history) == closed:
                raise CrashError

        with monkeypatch.context() as patch:
            patch.setattr(hospitals.kept, "save", die)
            with pytest.raises(CrashError):
                hospitals.run(hospitals.kept.states[-1] if hospitals.kept.states else START)
        state = hospitals.kept.states[-1]
        record = state.history[-1]
        key = f"{record.round:06d}-{record.stage}.key"
        assert key in hospitals.left()
        hospitals.study()._destroy_leftovers(state)
        assert key not in hospitals.left()
    assert model_of(state) == model_of(UNDISTURBED)
    assert hospitals.run(state) == state
    assert hospitals.left() == set()


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_a_task_that_flower_lost_is_sent_again_while_there_is_time(
    hospitals: Hospitals, code: int
) -> None:
    tries: list[bytes] = []

    def unlucky(envelope: bytes) -> Any:
        tries.append(envelope)
        good = hospitals.sites["site_c"](envelope)
        return Error(code=code, reason="lost") if len(tries) < 3 else good

    hospitals.grid.sites[13] = hospitals.only_in("train", unlucky, "site_c", 2)
    last = hospitals.run()
    assert failures(last) == []
    assert model_of(last) == model_of(UNDISTURBED)
    assert len(tries) == 3 and len(set(tries)) == 1
    assert hospitals.sites["site_c"].worked.count(hospitals.sites["site_a"].worked[2]) == 1
    record = next(r for r in last.history if (r.round, r.stage) == (2, "train"))
    assert record.bytes_down == 5 * len(tries[0])


def test_a_task_that_is_lost_without_a_word_is_sent_again(hospitals: Hospitals) -> None:
    seen: list[bytes] = []

    def swallow_first(envelope: bytes) -> Any:
        seen.append(envelope)
        return None if len(seen) == 1 else hospitals.sites["site_c"](envelope)

    hospitals.grid.sites[13] = hospitals.only_in("train", swallow_first, "site_c", 2)
    last = hospitals.run()
    assert failures(last) == []
    assert model_of(last) == model_of(UNDISTURBED)
    assert len(seen) == 2 and len(set(seen)) == 1
    assert 45 <= hospitals.time.now < 55


def test_a_site_that_says_it_is_busy_is_waited_for(hospitals: Hospitals) -> None:
    tries: list[bytes] = []

    def slow(envelope: bytes) -> Any:
        tries.append(envelope)
        if len(tries) == 1:
            return 50.0, hospitals.sites["site_c"](envelope)
        return Error(code=2, reason=BUSY)

    hospitals.grid.sites[13] = hospitals.only_in("train", slow, "site_c", 2)
    last = hospitals.run()
    assert failures(last) == []
    assert model_of(last) == model_of(UNDISTURBED)
    assert len(tries) == 2
    assert 50 <= hospitals.time.now < 60


def test_without_asking_again_a_lost_task_is_a_failure_at_once(hospitals: Hospitals) -> None:
    lost = Error(code=5, reason="lost")
    hospitals.grid.sites[13] = hospitals.only_in("train", lambda _e: lost, "site_c", 2)
    last = hospitals.run(reask=False)
    assert failures(last) == [(2, "train", "site_c", "unavailable")]


def test_a_task_that_is_lost_to_the_end_is_named_by_what_flower_said(hospitals: Hospitals) -> None:
    lost = Error(code=8, reason="lost")
    hospitals.grid.sites[13] = hospitals.only_in("train", lambda _e: lost, "site_c", 2)
    last = hospitals.run()
    assert failures(last) == [(2, "train", "site_c", "crashed")]
    assert 60 <= hospitals.time.now < 63


def test_a_node_that_was_away_without_a_word_is_asked_again_when_it_is_back(
    hospitals: Hospitals,
) -> None:
    grid, swallowed = hospitals.grid, []

    def swallow(envelope: bytes) -> Any:
        if swallowed:
            return hospitals.sites["site_c"](envelope)
        swallowed.append(envelope)
        grid.time.due += [
            (grid.time.now + 5, lambda: grid.sites.pop(13) and None),
            (grid.time.now + 20, lambda: grid.sites.update({13: site})),
        ]
        return None

    site = grid.sites[13] = hospitals.only_in("train", swallow, "site_c", 1)
    last = hospitals.run()
    assert failures(last) == []
    assert model_of(last) == model_of(UNDISTURBED)
    assert 20 <= hospitals.time.now < 30


def test_an_answer_to_the_first_and_to_the_second_asking_counts_once(hospitals: Hospitals) -> None:
    grid, asked = hospitals.grid, []

    def twice(envelope: bytes) -> Any:
        asked.append(envelope)
        if len(asked) == 1:
            grid.hidden.add(13)
            grid.time.due.append((grid.time.now + 6, grid.hidden.clear))
        return 9.0, hospitals.sites["site_c"](envelope)

    def slow(envelope: bytes) -> Any:
        return 40.0, hospitals.sites["site_b"](envelope)

    grid.sites[12] = hospitals.only_in("train", slow, "site_b", 1)
    grid.sites[13] = hospitals.only_in("train", twice, "site_c", 1)
    last = hospitals.run()
    assert len(asked) == 2
    assert model_of(last) == model_of(UNDISTURBED)
    assert [[a.site for a in r.answers] for r in last.history] == [list(SITES)] * 7


def test_a_site_that_was_away_at_the_opening_is_asked_when_it_comes_in_time(
    hospitals: Hospitals,
) -> None:
    grid = hospitals.grid

    def away(event: Event) -> None:
        hospitals.events.append(event)
        if isinstance(event, StageClosed) and event.record.round == 1:
            grid.away.add(13)
            grid.time.due.append((grid.time.now + 10, lambda: grid.away.discard(13)))

    grid.sites[12] = hospitals.only_in(
        "train", lambda e: (30.0, hospitals.sites["site_b"](e)), "site_b", 2
    )
    last = hospitals.run(observe=away)
    assert failures(last) == []
    assert model_of(last) == model_of(UNDISTURBED)
    gone = [e for e in hospitals.events if isinstance(e, SiteFailed)]
    assert [(e.round, e.failure.site, e.failure.code) for e in gone] == [(2, "site_c", "offline")]


def test_who_stays_away_is_missed_but_holds_nobody_up(hospitals: Hospitals) -> None:
    def leave(event: Event) -> None:
        hospitals.events.append(event)
        if isinstance(event, StageClosed) and event.record.round == 2:
            hospitals.grid.away.add(13)

    last = hospitals.run(observe=leave)
    assert failures(last)[-1] == (3, "release", "site_c", "offline")
    assert hospitals.time.now < 5


def test_a_site_comes_back_under_another_node(hospitals: Hospitals) -> None:
    def move(event: Event) -> None:
        hospitals.events.append(event)
        if isinstance(event, StageClosed) and event.record.round == 1:
            hospitals.grid.sites[99] = hospitals.grid.sites.pop(13)

    last = hospitals.run(observe=move)
    assert failures(last) == []
    assert model_of(last) == model_of(UNDISTURBED)
    assert {node for node, _ in hospitals.grid.tasks[-3:]} == {11, 12, 99}


def test_two_nodes_of_one_site_count_once(hospitals: Hospitals) -> None:
    hospitals.grid.sites[14] = hospitals.sites["site_a"]
    last = hospitals.run()
    assert [[a.site for a in r.answers] for r in last.history] == [list(SITES)] * 7
    assert model_of(last) == model_of(UNDISTURBED)


def test_a_node_that_delivers_anothers_answer_is_refused(hospitals: Hospitals) -> None:
    stolen = hospitals.only_in("train", hospitals.sites["site_a"], "site_c", 2)
    hospitals.grid.sites[13] = stolen
    last = hospitals.run()
    assert failures(last) == [(2, "train", "site_c", "site")]


def test_a_site_that_signs_what_names_another_is_refused(hospitals: Hospitals) -> None:
    def lie(task: bytes) -> bytes:
        header = peek(task, TaskHeader, max_bytes=10**7)
        if (header.stage, header.round) == ("evaluate", 2):
            return answer(task_digest(task), "site_a", body_of("evaluate"))
        return reply(task, "site_c", PLAN)

    hospitals.sites["site_c"].reply = lie
    assert failures(hospitals.run()) == [(2, "evaluate", "site_c", "site")]


def test_a_site_that_comes_late_enlists_before_the_next_stage(hospitals: Hospitals) -> None:
    late = hospitals.grid.sites.pop(13)

    def come(event: Event) -> None:
        hospitals.events.append(event)
        if isinstance(event, StageClosed) and event.record.round == 1:
            hospitals.grid.sites[13] = late

    last = hospitals.run(observe=come, nodes=2)
    assert [len(r.answers) for r in last.history] == [2, 2, 3, 3, 3, 3, 3]
    assert failures(last) == [(1, "train", "site_c", "offline")]


def test_a_node_that_never_enlists_is_not_asked_all_the_time(hospitals: Hospitals) -> None:
    asked: list[bytes] = []
    hospitals.grid.sites[14] = lambda e: (asked.append(e), b"who are you?")[1]
    last = hospitals.run()
    assert last.position is None
    assert len(asked) == 2
    assert {f[2] for f in failures(last)} == {"node-14"}


def test_when_the_roll_changes_the_sites_enlist_again(hospitals: Hospitals) -> None:
    def change(event: Event) -> None:
        hospitals.events.append(event)
        if isinstance(event, StageClosed) and event.record.round == 1:
            hospitals.grid.sites[14] = hospitals.site("site_d")
            hospitals.grid.sites[12] = lambda _envelope: Error(code=2, reason="refused")
            hospitals.enrol("site_b")

    last = hospitals.run(observe=change)
    names = [[a.site for a in record.answers] for record in last.history]
    assert names[1] == ["site_a", "site_b", "site_c"]
    assert names[2:] == [["site_a", "site_c", "site_d"]] * 5
    enlisted = [e for e in hospitals.events if isinstance(e, StageOpened) and e.stage == "enlist"]
    assert len(enlisted) >= 2
    assert hospitals.left() == set()


def test_a_site_that_has_to_approve_the_new_roll_first_goes_on_later(hospitals: Hospitals) -> None:
    def change(event: Event) -> None:
        hospitals.events.append(event)
        if isinstance(event, StageClosed):
            hospitals.time.sleep(100)
            if event.record.round == 1:
                hospitals.enrol()
                hospitals.sites["site_c"].reply = hesitate

    def hesitate(task: bytes) -> bytes:
        header = peek(task, TaskHeader, max_bytes=10**7)
        if header.stage == "enlist" and hospitals.time.now < 350:
            return answer(task_digest(task), "site_c", Refused(code="roster"))
        return reply(task, "site_c", PLAN)

    last = hospitals.run(observe=change)
    assert [len(record.answers) for record in last.history] == [3, 3, 2, 2, 3, 3, 3]
    failed = [e.failure for e in hospitals.events if isinstance(e, SiteFailed)]
    assert [(f.site, f.code) for f in failed][:2] == [("site_c", "roster"), ("site_c", "offline")]


def test_a_paused_study_opens_no_stage_and_says_so(hospitals: Hospitals) -> None:
    def paused() -> bool:
        closed = [e for e in hospitals.events if isinstance(e, StageClosed)]
        return len(closed) == 2 and hospitals.time.now < 500

    last = hospitals.run(paused=paused)
    assert 500 <= hospitals.time.now < 510
    assert [type(e) for e in hospitals.events].count(Paused) == 1
    place = [type(e) for e in hospitals.events].index(Paused)
    assert isinstance(hospitals.events[place - 1], StageClosed)
    assert isinstance(hospitals.events[place + 1], Resumed)
    assert model_of(last) == model_of(UNDISTURBED)


def test_the_release_is_offered_until_every_site_has_it(hospitals: Hospitals) -> None:
    def leave(event: Event) -> None:
        if isinstance(event, StageClosed) and event.record.stage == "evaluate":
            hospitals.grid.away.add(13)

    last = hospitals.run(observe=leave)
    study = hospitals.study(observe=nobody)  # a new process
    assert study.lacking(last) == ("site_c",)
    assert study.redeliver(last) == last
    hospitals.grid.away.clear()
    done = study.redeliver(last)
    assert study.lacking(done) == ()
    assert [a.site for a in done.history[-1].answers] == list(SITES)
    assert hospitals.kept.states[-1] is done
    assert [n for n, _ in hospitals.grid.tasks[-1:]] == [13]
    assert hospitals.left() == set()
    assert study.redeliver(done) is done
    assert len(set(hospitals.sites["site_a"].worked)) == len(hospitals.sites["site_a"].worked)


def test_a_revoked_site_is_owed_no_model(hospitals: Hospitals) -> None:
    def leave(event: Event) -> None:
        if isinstance(event, StageClosed) and event.record.stage == "evaluate":
            hospitals.grid.away.add(13)

    last = hospitals.run(observe=leave)
    study = hospitals.study(observe=nobody)
    assert study.lacking(last) == ("site_c",)
    hospitals.enrol("site_c")
    assert study.lacking(study.redeliver(last)) == ()


def test_a_site_that_was_enrolled_after_the_end_gets_the_model_too(hospitals: Hospitals) -> None:
    last = hospitals.run()
    study = hospitals.study()
    hospitals.grid.sites[14] = hospitals.site("site_d")
    hospitals.enrol()
    done = study.redeliver(last)
    assert [a.site for a in done.history[-1].answers] == [*SITES, "site_d"]
    header = open_task(next(iter(_release_of(hospitals, "site_d"))), PLAN)[0]
    assert Position(round=header.round, stage=header.stage) == Position(round=3, stage="release")


def _release_of(hospitals: Hospitals, name: str) -> list[bytes]:
    from fedseg.aggregation.rounds import release_task

    task = release_task(hospitals.kept.states[-1], PLAN)
    return [task] if task_digest(task) in hospitals.sites[name].worked else []


def test_a_released_model_is_offered_less_and_less_often_and_names_nobody_who_has_it(
    hospitals: Hospitals,
) -> None:
    broken = Error(code=2, reason="broken")
    hospitals.grid.sites[13] = hospitals.only_in("release", lambda _e: broken, "site_c")
    last, study = hospitals.run(), hospitals.study()
    hospitals.events.clear()
    until = hospitals.time.now + 86_400
    while hospitals.time.now < until:
        last = study.redeliver(last)
        hospitals.time.sleep(5)
    failed = [e.failure for e in hospitals.events if isinstance(e, SiteFailed)]
    assert {(f.site, f.code) for f in failed} == {("site_c", "crashed")}
    assert 90 < len(failed) < 110  # not 17280
    hospitals.grid.sites[13] = hospitals.sites["site_c"]
    hospitals.time.sleep(900)
    assert study.lacking(study.redeliver(last)) == ()


def test_a_revoked_site_is_not_waited_for(hospitals: Hospitals) -> None:
    def revoke() -> None:
        hospitals.enrol("site_c")
        del hospitals.grid.sites[13]

    def silent(_envelope: bytes) -> None:
        hospitals.time.due.append((hospitals.time.now + 10, revoke))

    hospitals.grid.sites[13] = hospitals.only_in("train", silent, "site_c", 2)
    closed: dict[tuple[int, str], float] = {}

    def note(event: Event) -> None:
        hospitals.events.append(event)
        if isinstance(event, StageClosed):
            closed[event.record.round, event.record.stage] = hospitals.time.now

    last = hospitals.run(observe=note)
    assert failures(last)[0] == (2, "train", "site_c", "site")
    assert closed[2, "train"] - closed[1, "train"] < 15  # of 60
    assert [a.site for a in last.history[-1].answers] == ["site_a", "site_b"]


def test_a_pause_that_comes_while_nodes_are_waited_for_is_heeded(hospitals: Hospitals) -> None:
    grid, time, asked = hospitals.grid, hospitals.time, []

    def paused() -> bool:
        return 10 <= time.now < 500

    def leave(event: Event) -> None:
        hospitals.events.append(event)
        if isinstance(event, StageClosed) and event.record.stage == "enlist":
            grid.away |= {12, 13}
            time.due.append((time.now + 20, grid.away.clear))
        if isinstance(event, StageOpened):
            asked.append(time.now)

    last = hospitals.run(observe=leave, paused=paused)
    assert not [at for at in asked if 10 <= at < 500]
    assert model_of(last) == model_of(UNDISTURBED)


class GarblingGrid(MemoryGrid):
    """What one node answers while a stage is open makes Flower itself stumble."""

    def __init__(self, whole: MemoryGrid, error: Exception, garbled: Callable[[int], bool]) -> None:
        super().__init__(whole.sites, whole.time)
        self.error, self.garbled = error, garbled

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            if self.garbled(self.sent[message_id].metadata.dst_node_id):
                raise self.error
        return super().pull_messages(message_ids)


@pytest.mark.parametrize(
    "content", [b"Message  0\0", b"Message  2\0{}", b"RecordDict  1\0{", b"Array  2\0{}"]
)
def test_objects_that_flower_cannot_read_cost_a_relay_its_own_answer_alone(
    hospitals: Hospitals, content: bytes
) -> None:
    """Well-formed enough for the SuperLink to store; Flower raises where the ServerApp pulls."""
    validate_object_content(content)
    with pytest.raises(UNREADABLE) as raised:
        inflate_object_from_contents("id", {"id": content})

    def garbled(node: int) -> bool:
        opened = hospitals._opened()
        return (node, opened.round, opened.stage) == (13, 2, "train")

    hospitals.grid = GarblingGrid(hospitals.grid, raised.value, garbled)
    last = hospitals.run()
    assert failures(last) == [(2, "train", "site_c", "malformed")]
