"""A tap at the trainers' sockets reads what relays get: it is what the hospitals' lists say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from memory_grid import Kept, MemoryGrid, Time
from small_departures import STUDY, listed, serving
from small_hospitals import NOW, Consortium, Hospital, joined, text
from small_private_sites import (
    fixture_data,  # noqa: F401
    private_built,
)

from coordinator.rounds.study import Study
from coordinator.sealing.exchange import SealedExchange
from fedseg.aggregation.rounds import StudyState, first_state
from fedseg.container import peek
from fedseg.security.keys import load_signing_key
from fedseg.updates import TaskHeader
from sites.client import Door, ask
from sites.cohort import choose_cohort
from sites.decision import approve
from sites.folder import SiteFolder
from sites.founding import found

SITES = ("hospital_a", "hospital_b", "hospital_c")


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
