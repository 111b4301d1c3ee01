"""Hospitals' own models between coordinator and sites that have keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Error
from memory_grid import Kept, MemoryGrid, SealedSite, Time
from own_models import (
    PLAN,
    Runner,
    own_stages,
    reply,
)
from pure_studies import SITES
from small_parties import Party, roll_of
from small_plans import answer, tiny_model

from coordinator.rounds.events import Event, StageClosed, StageOpened, nobody
from coordinator.rounds.study import Study
from coordinator.sealing.exchange import SealedExchange
from fedseg.aggregation.rounds import StudyState, first_state
from fedseg.security.identity import Revoked, sign_roll
from fedseg.security.keys import SigningKey
from fedseg.updates import (
    Refused,
    TaskHeader,
    peek,
    task_digest,
)


class Sealed:
    """The same with keys, envelopes and a registry."""

    def __init__(self, folder: Path, **replies: dict[str, Any]) -> None:
        self.folder, self.key, self.time, self.kept = folder, SigningKey.generate(), Time(), Kept()
        self.parties = {site: Party(site) for site in SITES}
        self.version, self.events = 0, list[Event]()
        sites = {}
        for node, (site, party) in enumerate(self.parties.items(), start=11):
            options = {"party": party} | replies.get(site, {})
            sites[node] = SealedSite(
                party, PLAN, self.key.public, partial(reply, site=site, **options)
            )
        self.grid = MemoryGrid(sites, self.time)
        self.enrol()

    def enrol(self, *revoked: str) -> None:
        self.version += 1
        there = [party for name, party in self.parties.items() if name not in revoked]
        gone = tuple(
            Revoked(name=name, signing=self.parties[name].signing.public.text) for name in revoked
        )
        signed = sign_roll(roll_of(*there, version=self.version, revoked=gone), self.key)
        (self.folder / "registry.json").write_bytes(signed.canonical_bytes)

    def run(self, observe: Callable[[Event], None] = nobody) -> StudyState:
        registry, outbox = self.folder / "registry.json", self.folder / "outbox"
        exchange = SealedExchange(PLAN, self.key, registry=registry, outbox=outbox)
        study = Study(
            self.grid, PLAN, self.kept, nodes=3, clock=self.time.clock, reask=True,
            exchange=exchange, own_models=self.folder / "own", observe=observe,
        )  # fmt: skip
        end = study.run(first_state(PLAN, tiny_model()))
        assert list(outbox.iterdir()) == []
        return end


class TestSealed:
    def test_a_sealed_study_finds_what_the_open_one_does(self, tmp_path: Path) -> None:
        (tmp_path / "sealed").mkdir()
        end = Sealed(tmp_path / "sealed").run()
        assert own_stages(end) == own_stages(Runner(tmp_path / "open").run())

    def test_a_consent_that_the_site_did_not_sign_is_refused(self, tmp_path: Path) -> None:
        end = Sealed(tmp_path, site_c={"party": None}).run()
        (failure,) = [f for r in end.history for f in r.failures]
        assert (failure.site, failure.code) == ("site_c", "signature")
        assert set(own_stages(end)) == {"site_a", "site_b"}

    def test_the_model_of_a_site_that_was_revoked_since_is_not_passed_on(
        self, tmp_path: Path
    ) -> None:
        study = Sealed(tmp_path)

        def revoke(event: Event) -> None:
            if isinstance(event, StageClosed) and event.record.owner == "site_a":
                study.enrol("site_b")
                del study.grid.sites[12]

        end = study.run(revoke)
        found = own_stages(end)
        assert found["site_b"] == {} and set(found["site_c"]) == {"site_a", "site_c"}
        failed = [(r.owner, f.site, f.code) for r in end.history for f in r.failures]
        assert ("site_b", "site_b", "site") in failed

    def test_a_site_that_is_revoked_while_its_model_is_measured_has_it_sent_to_nobody_more(
        self, tmp_path: Path
    ) -> None:
        study, measuring, asked = Sealed(tmp_path), False, 0
        good = study.grid.sites[13]

        def look(event: Event) -> None:
            nonlocal measuring
            if isinstance(event, StageOpened):
                measuring = event.owner == "site_b"

        def away_at_first(task: bytes) -> Any:
            nonlocal asked
            if not measuring:
                return good(task)
            asked += 1
            study.enrol("site_b")
            study.grid.sites.pop(12, None)
            return Error(code=5, reason="Node unavailable")

        study.grid.sites[13] = away_at_first
        end = study.run(look)
        assert asked == 1
        assert own_stages(end)["site_b"] == {}
        assert ("site_b", "site") in [(f.site, f.code) for r in end.history for f in r.failures]

    def test_a_hospital_that_joins_after_the_last_word_gets_no_own_model(
        self, tmp_path: Path
    ) -> None:
        """Each let its model go to the hospitals that it had accepted by then."""
        study, seen = Sealed(tmp_path), set[str | None]()

        def newcomer(task: bytes) -> bytes:
            header = peek(task, TaskHeader, max_bytes=10**7)
            seen.add(header.owner)
            if header.stage in ("enlist", "release"):
                return reply(task, "site_d")
            return answer(task_digest(task), "site_d", Refused(code="failed"), None)

        def join(event: Event) -> None:
            if isinstance(event, StageClosed) and event.record.owner == "site_a":
                party = study.parties["site_d"] = Party("site_d")
                study.grid.sites[14] = SealedSite(party, PLAN, study.key.public, newcomer)
                study.enrol()

        end = study.run(join)
        found = own_stages(end)
        assert seen == {None} and set(found["site_a"]) == set(SITES)
        assert found["site_b"] == found["site_c"] == {}
        failed = [(f.site, f.code) for r in end.history for f in r.failures if r.owner == f.site]
        assert failed == [("site_b", "joined"), ("site_c", "joined")]
