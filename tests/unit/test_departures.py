"""What leaves a hospital: held until its time, of a fixed length, and an entry of the audit each.

Real gates on phantoms, with private plans; a tap at the trainer's socket reads what relays get.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from memory_grid import Kept, MemoryGrid, Time
from small_hospitals import NOW, Consortium, Hospital, joined, phantoms, text
from small_private_sites import private_built, private_hospital
from typer.testing import CliRunner, Result

from coordinator.rounds.study import Study
from coordinator.sealing.exchange import SealedExchange
from fedseg.aggregation.rounds import StudyState, first_state
from fedseg.container import peek
from fedseg.durable import Buffer
from fedseg.errors import FedsegError, StorageError
from fedseg.security.keys import ReceivingKey, load_signing_key
from fedseg.updates import AnswerHeader, TaskHeader
from sites import cli, service
from sites.client import BusyError, Clock, Door, ask, status
from sites.cohort import choose_cohort
from sites.decision import approve, refuse
from sites.folder import SiteFolder
from sites.founding import found
from sites.gate import Gate
from sites.journal import Journal
from sites.listening import Place, make_server, opened_place
from sites.outbox import Answer
from sites.service import Desk
from sites.trainer import Trainer

STUDY = "tiny"
SITES = ("hospital_a", "hospital_b", "hospital_c")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms(tmp_path_factory.mktemp("phantoms"), patients=6)


@pytest.fixture(scope="module")
def founded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return private_hospital(tmp_path_factory.mktemp("founded") / "site", data)


@pytest.fixture(scope="module")
def holding(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    place = tmp_path_factory.mktemp("holding") / "site"
    return private_hospital(place, data, release_after_s=30.0)


def copied(site: Hospital, path: Path) -> Hospital:
    copy = SiteFolder(path)
    shutil.copytree(site.folder.path, copy.path)
    return Hospital(copy, site.consortium, site.roll, site.own)


@pytest.fixture
def site(founded: Hospital, tmp_path: Path) -> Hospital:
    """A hospital that has approved a private plan and answered nothing yet."""
    return copied(founded, tmp_path / "site")


@pytest.fixture
def holder(holding: Hospital, tmp_path: Path) -> Hospital:
    """The same, whose answers leave 30 s after their tasks came."""
    return copied(holding, tmp_path / "site")


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


def size_of(answer: Answer) -> int:
    return len(bytes_of(answer))


def bytes_of(answer: Answer) -> bytes:
    return answer if isinstance(answer, bytes) else answer.read_bytes()


def during_the_work(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Something happens while the trainer works."""
    work = Trainer.handle

    def handle(trainer: Trainer, task: Buffer) -> bytes:
        happens()
        return work(trainer, task)

    monkeypatch.setattr(Trainer, "handle", handle)


def egress(folder: SiteFolder, *words: object) -> Result:
    """Call `fedseg-site egress`."""
    args = ["egress", *map(str, words), "--site", str(folder.path)]
    result = CliRunner().invoke(cli.app, args, env={"COLUMNS": "250"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def listed(folder: SiteFolder, *words: object) -> list[dict[str, Any]]:
    """What `egress list --json` says."""
    lines = egress(folder, "list", "--json", *words).stdout.splitlines()
    return [json.loads(line) for line in lines]


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


class TestLength:
    def test_a_private_answers_length_tells_nothing_of_the_patients(
        self, site: Hospital, data: Path, tmp_path: Path
    ) -> None:
        """Several draws; patients who cannot be read; patients whose images are not finite."""
        sizes, lost = {}, {}
        for name in ("healthy", "unreadable", "not finite"):
            own = tmp_path / name
            shutil.copytree(data, own)
            there = private_hospital(tmp_path / f"site {name}", own, rate=0.75)
            gate = there.gate()
            enlisted = size_of(there.ask(there.task("enlist", 0), gate))
            for image in sorted((own / "images").iterdir()):
                spoil(image, name)
            trained = [
                size_of(there.ask(there.task("train", round_), gate)) for round_ in (1, 2, 3)
            ]
            assert {e.facts["type"] for e in there.audited("egress")} == {"enlist", "train"}
            sizes[name] = (enlisted, *trained)
            rounds = Journal(there.folder.work(STUDY) / "journal.jsonl").read("trained")
            lost[name] = sum(int(str(entry["lost"])) for entry in rounds)
        assert len(set(sizes.values())) == 1
        assert len(set(sizes["healthy"][1:])) == 1
        assert lost["healthy"] == 0 < min(lost["unreadable"], lost["not finite"])

    def test_an_answer_of_another_length_does_not_leave(
        self, site: Hospital, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fedseg.updates import seal_answer

        monkeypatch.setattr("sites.trainer.seal_answer", lambda h, d, _plan: seal_answer(h, d))
        assert site.code(site.ask(site.task())) == "plan"
        assert "length" in str(site.audited("refused")[-1].facts["reason"])
        assert [e.facts["type"] for e in site.audited("egress")] == ["refused"]


class TestHead:
    def test_a_whole_folder_that_was_put_back_is_found_out(
        self, site: Hospital, tmp_path: Path
    ) -> None:
        """Ledger, audit, keys and answers together: nothing inside disagrees with anything."""
        heads = [head_after(site, 1)]
        older = tmp_path / "backup"
        shutil.copytree(site.folder.path, older)
        heads.append(head_after(site, 2, heads[0]))
        shutil.rmtree(site.folder.path)
        shutil.copytree(older, site.folder.path)
        for stage, round_ in (("train", 3), ("enlist", 0), ("train", 3)):
            plain = site.consortium.plain(stage, round_, heads={site.own.name: heads[1]})
            assert site.code(site.ask(site.task(plain=plain))) == "task"
            assert "put back to an older" in str(site.audited("refused")[-1].facts["reason"])
        assert site.trained == 1, "that of the first round, before the backup"
        assert head_after(site, 2, heads[0]) is not None, "the state of the backup is still known"

    def test_heads_tell_nothing(self, site: Hospital) -> None:
        head = head_after(site, 1)
        assert head is not None
        assert head.encode() not in site.folder.ledger.read_bytes()
        rows = [str(entry.facts["hash"]) for entry in site.audited("ledger_row")]
        assert rows and head not in rows


class TestList:
    def test_before_anything_left_the_list_is_empty(self, site: Hospital) -> None:
        assert listed(site.folder) == []
        assert "0 messages left" in egress(site.folder, "list").stdout

    def test_every_message_is_there_with_all_that_it_said(self, site: Hospital) -> None:
        gate = site.gate()
        envelope = site.task("train", 1)
        sent = [
            site.ask(site.task("enlist", 0), gate),
            site.ask(envelope, gate),
            site.ask(envelope, gate),
            site.ask(site.task(reply_to=ReceivingKey.generate().public), gate),
            site.ask(site.task(plan="0" * 64), gate),
            site.ask(site.task("train", 2), gate),
        ]
        found = listed(site.folder)
        assert [each["digest"] for each in found] == [
            hashlib.sha256(bytes_of(answer)).hexdigest() for answer in sent
        ]
        assert [each["bytes"] for each in found] == [size_of(answer) for answer in sent]
        assert [each["repeated"] for each in found] == [False, False, True, True, False, False]
        assert [each["type"] for each in found] == ["enlist", *["train"] * 3, "refused", "train"]
        assert [each["paid"] for each in found] == [False, True, False, False, False, True]
        plan = site.consortium.plan
        trained = found[1]
        assert (trained["tensors"], trained["tensor_bytes"]) == (
            len(plan.built.tensors),
            plan.built.nbytes,
        )
        assert (trained["noise_multiplier"], trained["rate"], trained["steps"]) == (
            plan.noise.training,
            1.0,
            1,
        )
        assert plan.private and 0 < trained["epsilon"] < plan.private.epsilon
        assert {each["content"] for each in found[1:4]} == {trained["content"]}
        assert found[3]["key"] != found[2]["key"]
        said = peek(site.consortium.read(sent[1], site.own), AnswerHeader, max_bytes=10**8)
        fields = dict(field.partition("=")[::2] for field in trained["fields"])
        assert fields.pop("head") == json.dumps(said.head)
        assert fields == {
            "format": '"fedseg-answer/1"',
            "task": json.dumps(said.task),
            "site": '"hospital_a"',
            "body.kind": '"train"',
            "body.patients": "null",
            "body.steps": "1",
            "body.loss": "null",
        }

    def test_words_for_people(self, site: Hospital) -> None:
        gate, envelope = site.gate(), site.task()
        for task in (envelope, envelope, site.task(plan="0" * 64)):
            site.ask(task, gate)
        shown = egress(site.folder, "list").stdout
        assert "train, round 1 train, repeated" in shown and "paid before" in shown
        assert "refused (plan), round 1 train" in shown and "fl.test:443" in shown
        assert re.search(r"tiny: in all epsilon [\d.]+ at delta 1e-05 for each patient", shown)
        number = listed(site.folder)[0]["number"]
        one = egress(site.folder, "show", number).stdout
        assert "body.patients=null" in one and "noise multiplier" in one
        assert json.loads(egress(site.folder, "show", number, "--json").stdout)["number"] == number
        assert len(listed(site.folder, "--last", 1)) == 1
        assert listed(site.folder, "--study", "lung") == []
        with pytest.raises(Exception, match="egress list"):
            egress(site.folder, "show", 1)

    def test_a_list_that_somebody_cut_is_not_shown(self, site: Hospital) -> None:
        site.ask(site.task())
        lines = site.folder.audit.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if b'"event":"egress"' not in line]
        assert len(kept) == len(lines) - 1
        site.folder.audit.write_bytes(b"".join(kept))
        with pytest.raises(Exception, match="tail is missing"):
            egress(site.folder, "list")

    def test_nothing_leaves_where_it_cannot_be_recorded(
        self, site: Hospital, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate, path = site.gate(), site.folder.path / "envelope"
        path.write_bytes(site.task())
        ready = gate.prepare(path, 0.0)

        def full(*_: object, **__: object) -> None:
            raise StorageError("the disk is full")

        monkeypatch.setattr("fedseg.chain.Chain.append", full)
        with pytest.raises(StorageError):
            gate.release(ready)


class Consortiums:
    """Three hospitals with services on sockets, and a coordinator whose relays are tapped."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.consortium = Consortium(*private_built())
        self.folder, self.tapped = folder, {name: list[bytes]() for name in SITES}
        folders = {name: SiteFolder(folder / name) for name in SITES}
        owns = {name: found(folders[name], name, text(NOW)) for name in SITES}
        roll = self.consortium.roll(*owns.values())
        self.sites = {}
        for name, own in owns.items():
            joined(folders[name], self.consortium, roll)
            self.sites[name] = Hospital(folders[name], self.consortium, roll, own)
            approve_as(name, self.sites[name], data)
        self.registry = folder / "registry.json"
        self.registry.write_bytes(roll.canonical_bytes)
        self.kept, self.time, self.grid = Kept(), Time(), MemoryGrid({}, Time())

    def run(self) -> StudyState:
        """A whole study, through sealed envelopes and the trainers' sockets."""
        plan = self.consortium.plan
        exchange = SealedExchange(
            plan, self.consortium.key, registry=self.registry, outbox=self.folder / "outbox"
        )
        with ExitStack() as stack:
            for number, name in enumerate(SITES):
                door, _ = stack.enter_context(serving({STUDY: self.sites[name]}))
                self.grid.sites[11 + number] = self.relay(name, door)
            study = Study(
                self.grid, plan, self.kept, nodes=3, clock=self.time.clock, exchange=exchange
            )
            return study.run(first_state(plan, self.consortium.model))

    def relay(self, name: str, door: Door) -> Callable[[bytes], bytes]:
        """A relay with a tap between it and the trainer's socket."""

        def carry(envelope: bytes) -> bytes:
            answer = ask(door, STUDY, envelope)
            self.tapped[name].append(answer)
            return answer

        return carry


def test_what_a_tap_at_the_trainers_sockets_sees_is_the_list(data: Path, tmp_path: Path) -> None:
    study = Consortiums(tmp_path, data)
    last = study.run()
    assert last.position is None
    assert not [f for record in last.history for f in record.failures]
    stages = [(record.round, record.stage) for record in last.history]
    assert ("train" in dict(stages).values()) and stages[-1] == (3, "release")
    for name, site in study.sites.items():
        tapped, found = study.tapped[name], listed(site.folder)
        assert len(tapped) == len(stages)
        assert [(each["digest"], each["bytes"]) for each in found] == [
            (hashlib.sha256(answer).hexdigest(), len(answer)) for answer in tapped
        ]
        assert [(each["round"], each["stage"]) for each in found] == stages
        assert sum(each["paid"] for each in found) == 3, "three rounds of training"
        heads = [next(a.head for a in r.answers if a.site == name) for r in last.history]
        assert None not in heads
        said = [f for each in found for f in each["fields"] if f.startswith("head=")]
        assert said == [f"head={json.dumps(head)}" for head in heads]
    received = [header.heads for header in tasks_at(study.sites["hospital_a"], study.grid)]
    for n, heads_told in enumerate(received):
        before = last.history[:n]
        assert heads_told == {a.site: a.head for r in before[-1:] for a in r.answers}


def tasks_at(site: Hospital, grid: MemoryGrid) -> list[TaskHeader]:
    """The headers of the tasks that a site was sent."""
    from fedseg.security.envelope import open_bytes
    from fedseg.security.keys import load_receiving_key

    found = []
    for node, envelope in grid.tasks:
        if node == 11 + SITES.index(site.own.name):
            _, plain = open_bytes(
                envelope,
                kind="task",
                study=STUDY,
                signer=site.consortium.key.public,
                recipient=site.own.name,
                key=load_receiving_key(site.folder.receiving_key),
                max_bytes=10**8,
            )
            found.append(peek(plain, TaskHeader, max_bytes=10**8))
    return found


def approve_as(name: str, site: Hospital, data: Path) -> None:
    """Approve on the phantoms under a name of its own."""
    folder, plan = site.folder, site.consortium.plan
    chosen = choose_cohort(name, plan, data, row="hospital_a")
    key = load_signing_key(folder.signing_key)
    approve(
        folder, STUDY, chosen.record, key, any_later_sites=False, by="me", now=lambda: text(NOW)
    )


def hospital_of(folder: SiteFolder, consortium: Consortium, data: Path) -> Hospital:
    """A hospital that is there already takes part in another consortium's study too."""
    from small_hospitals import approved

    from sites.keyring import own_identity

    own = own_identity(folder)
    roll = consortium.roll(own)
    joined(folder, consortium, roll)
    approved(folder, consortium, data)
    return Hospital(folder, consortium, roll, own)


@contextmanager
def serving(sites: dict[str, Hospital]) -> Iterator[tuple[Door, Desk]]:
    """One hospital's service for its studies, on its socket."""
    folder = next(iter(sites.values())).folder

    def open_gate(study: str) -> Gate:
        return sites[study].gate()

    desk = Desk(folder, open_gate, lambda: None, lambda _reason: None)
    place = Place(f"unix:{folder.socket}")
    with opened_place(folder, place) as (listener, _):
        server = make_server(folder, desk, None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield Door(place.address), desk
        server.should_exit = True
        thread.join(10)


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def head_after(site: Hospital, round_: int, before: str | None = None) -> str | None:
    """The head that a round's answer carries, for a task that acknowledges the one before."""
    heads = {site.own.name: before} if before else {}
    plain = site.consortium.plain("train", round_, heads=heads)
    said = site.said(site.ask(site.task(plain=plain)))
    assert said.body.kind == "train"
    return said.head


def spoil(image: Path, how: str) -> None:
    """Make an image unreadable, or its values not finite."""
    import nibabel
    import numpy as np

    if how == "unreadable":
        image.write_bytes(b"no image")
    elif how == "not finite":
        loaded = nibabel.load(image)
        values = np.full(loaded.shape, np.nan, np.float32)
        nibabel.save(nibabel.Nifti1Image(values, loaded.affine), image)
