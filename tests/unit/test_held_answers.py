"""An answer leaves when its time has come, and nothing else tells when its work ended."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from small_departures import STUDY, bytes_of, egress, serving, until
from small_hospitals import Consortium, Hospital, joined
from small_private_sites import (
    fixture_data,  # noqa: F401
    private_built,
    private_hospital,
)

from fedseg.durable import Buffer
from fedseg.errors import FedsegError, StorageError
from sites import service
from sites.client import BusyError, Clock, ask, status
from sites.decision import refuse
from sites.folder import SiteFolder
from sites.trainer import Trainer


@pytest.fixture(scope="module")
def holding(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    place = tmp_path_factory.mktemp("holding") / "site"
    return private_hospital(place, data, release_after_s=30.0)


@pytest.fixture
def holder(holding: Hospital, tmp_path: Path) -> Hospital:
    """A hospital with a private plan whose answers leave 30 s after their tasks came."""
    copy = SiteFolder(tmp_path / "site")
    shutil.copytree(holding.folder.path, copy.path)
    return Hospital(copy, holding.consortium, holding.roll, holding.own)


class Watch:
    """A clock that moves when somebody sleeps, and remembers how long."""

    def __init__(self) -> None:
        self.time, self.slept = 1000.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.time, sleep=self.sleep)


def during_the_work(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Something happens while the trainer works."""
    work = Trainer.handle

    def handle(trainer: Trainer, task: Buffer) -> bytes:
        happens()
        return work(trainer, task)

    monkeypatch.setattr(Trainer, "handle", handle)


class TestHold:
    def test_an_answer_leaves_exactly_that_long_after_its_task_came(
        self, holder: Hospital, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watch = Watch()
        gate = holder.gate(clock=watch.clock)
        for round_, took in ((1, 0.0), (2, 12.5)):
            with monkeypatch.context() as patch:
                during_the_work(patch, lambda took=took: watch.sleep(took))
                came = watch.time
                assert (
                    holder.said(holder.ask(holder.task("train", round_), gate)).body.kind == "train"
                )
                assert watch.time == came + 30.0
                assert watch.slept[-1] == 30.0 - took
        assert [entry.facts.get("late_s") for entry in holder.audited("egress")] == [None, None]

    def test_nothing_is_recorded_as_left_before_it_is_due(self, holder: Hospital) -> None:
        watch = Watch()
        gate = holder.gate(clock=watch.clock)
        path = holder.folder.path / "envelope"
        path.write_bytes(holder.task())
        ready = gate.prepare(path, watch.time)
        assert ready.due == watch.time + 30.0
        assert holder.audited("answered") and not holder.audited("egress")
        answer = gate.release(ready)
        (entry,) = holder.audited("egress")
        assert entry.facts["digest"] == hashlib.sha256(bytes_of(answer)).hexdigest()

    def test_a_late_answer_leaves_when_it_is_ready_and_says_so(
        self, holder: Hospital, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watch = Watch()
        during_the_work(monkeypatch, lambda: watch.sleep(45.0))
        holder.ask(holder.task(), holder.gate(clock=watch.clock))
        assert watch.slept == [45.0]
        (entry,) = holder.audited("egress")
        assert entry.facts["late_s"] == 15.0
        assert "15.0 s late" in egress(holder.folder, "list").stdout

    def test_the_same_task_again_waits_for_the_same_moment(self, holder: Hospital) -> None:
        watch = Watch()
        gate, path = holder.gate(clock=watch.clock), holder.folder.path / "envelope"
        path.write_bytes(holder.task())
        first = gate.prepare(path, watch.time)
        watch.time += 10.0
        again = gate.prepare(path, watch.time)
        assert again.due == first.due
        gate.release(first)
        watch.time += 100.0
        assert gate.prepare(path, watch.time).due == first.due, "it may leave at once"
        started_anew = holder.gate(clock=watch.clock)
        assert started_anew.prepare(path, watch.time).due == watch.time + 30.0

    def test_a_refusal_after_work_is_held_and_enlisting_is_not(
        self, holder: Hospital, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watch = Watch()
        gate = holder.gate(clock=watch.clock)
        assert holder.said(holder.ask(holder.task("enlist", 0), gate)).body.kind == "enlist"
        assert watch.slept == []

        def fails(*_: object) -> None:
            raise StorageError("the disk is full")

        monkeypatch.setattr(Trainer, "_train_privately", fails)
        assert holder.code(holder.ask(holder.task(), gate)) == "failed"
        assert watch.slept == [30.0]
        assert [e.facts["type"] for e in holder.audited("egress")] == ["enlist", "refused"]

    def test_what_the_hospital_takes_back_while_it_is_held_does_not_leave(
        self, holder: Hospital
    ) -> None:
        watch = Watch()

        def sleep(seconds: float) -> None:
            refuse(holder.folder, STUDY, "consent", holder.signing)
            watch.sleep(seconds)

        gate = holder.gate(clock=Clock(now=lambda: watch.time, sleep=sleep))
        assert holder.code(holder.ask(holder.task(), gate)) == "plan"
        assert [e.facts["type"] for e in holder.audited("egress")] == ["refused"]

    def test_nothing_else_tells_when_work_on_a_held_answer_ended(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two studies at one hospital; the first one's answer is held for 6 seconds."""
        site = private_hospital(tmp_path / "site", data, release_after_s=6.0)
        other = hospital_of(
            site.folder, Consortium(*private_built(study="other", epsilon=0.5)), data
        )
        done, took = list[float](), dict[str, float]()
        work = Trainer.handle

        def handle(trainer: Trainer, task: Buffer) -> bytes:
            answer = work(trainer, task)
            done.append(time.monotonic())
            return answer

        def asks(name: str, study: str, envelope: bytes) -> threading.Thread:
            def go() -> None:
                with suppress(FedsegError):
                    ask(door, study, envelope, patience_s=0)
                took[name] = time.monotonic() - started

            thread = threading.Thread(target=go)
            thread.start()
            return thread

        with serving({STUDY: site, "other": other}) as (door, desk):
            assert ask(door, STUDY, site.task("enlist", 0))
            assert ask(door, "other", other.task("enlist", 0))
            monkeypatch.setattr(Trainer, "handle", handle)
            envelope, started = site.task(), time.monotonic()
            asked = [asks("train", STUDY, envelope)]
            until(lambda: desk.doing is not None)
            for moment in ("at work", "held"):
                asked.append(asks(f"own, {moment}", STUDY, site.task("enlist", 0)))
                asked.append(asks(f"other, {moment}", "other", other.task("enlist", 0)))
                asked.append(asks(f"stranger, {moment}", STUDY, b"rubbish " + moment.encode()))
                until(lambda: bool(done))
            until(lambda: desk.waiting == len(asked))
            said = status(door, timeout_s=1.0)
            assert (said["doing"]["stage"], said["waiting"]) == ("train", len(asked) - 1)
            with pytest.raises(BusyError):
                ask(door, STUDY, envelope)
            with monkeypatch.context() as patch:
                patch.setattr(service, "MOST_HELD", 1)
                plain = site.consortium.plain("train", 1, attempt=2)
                with pytest.raises(Exception, match="429"):
                    ask(door, STUDY, site.task(plain=plain), patience_s=0)
            assert done[0] - started < 5.0, "too slow a machine for this test"
            assert not took, "something left before the time of the answer that is held"
            for thread in asked:
                thread.join(30)
            assert min(took.values()) >= 6.0
            assert status(door, timeout_s=1.0)["doing"] is None

    def test_other_studies_are_worked_on_while_an_answer_is_held(
        self, data: Path, tmp_path: Path
    ) -> None:
        site = private_hospital(tmp_path / "site", data, release_after_s=4.0)
        other = hospital_of(
            site.folder, Consortium(*private_built(study="other", epsilon=0.5)), data
        )
        with serving({STUDY: site, "other": other}) as (door, _):
            waits = threading.Thread(target=lambda: ask(door, STUDY, site.task()))
            waits.start()
            until(lambda: site.trained == 1)
            assert ask(door, "other", other.task("train", 1))
            waits.join(30)
        first, second = (entry.facts for entry in site.audited("egress"))
        assert {first["study"], second["study"]} == {STUDY, "other"}
        received = [entry.facts["study"] for entry in site.audited("task_received")]
        assert received == [STUDY, "other"]


def hospital_of(folder: SiteFolder, consortium: Consortium, data: Path) -> Hospital:
    """A hospital that is there already takes part in another consortium's study too."""
    from small_hospitals import approved

    from sites.keyring import own_identity

    own = own_identity(folder)
    roll = consortium.roll(own)
    joined(folder, consortium, roll)
    approved(folder, consortium, data)
    return Hospital(folder, consortium, roll, own)
