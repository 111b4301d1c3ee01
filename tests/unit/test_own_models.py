"""Hospitals' own models at the coordinator: which are measured, what is kept, what kills leave."""

from __future__ import annotations

import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error
from hypothesis import given
from hypothesis import strategies as st
from memory_grid import Kept, MemoryGrid, SealedSite, Time
from own_models import PLAN, ROUNDS, SITES, consent_of, expected_own, last, measured, reply
from pure_studies import run_purely, train
from small_parties import Party, roll_of
from small_plans import answer, body_of, built_plan, private_values, tiny_model, values

from coordinator.dashboard.notices import Situation
from coordinator.dashboard.page import render
from coordinator.progress.keeper import ProgressKeeper
from coordinator.rounds.events import Event, SiteFailed, StageClosed, StageOpened, nobody
from coordinator.rounds.study import Study
from coordinator.sealing.exchange import SealedExchange
from fedseg.aggregation.checkpoint import load_state, save_state
from fedseg.aggregation.ownmodels import LetGo, LostModelError, OwnModels, own_model
from fedseg.aggregation.rounds import StudyState, ahead, first_state, open_stage
from fedseg.arrays import digest_of
from fedseg.errors import TrustError
from fedseg.plan import StudyPlan
from fedseg.reports import ownmodels
from fedseg.security.identity import Revoked, sign_roll
from fedseg.security.keys import SigningKey
from fedseg.updates import (
    AnswerHeader,
    Refused,
    TaskHeader,
    Trained,
    open_task,
    peek,
    seal_answer,
    seal_task,
    task_digest,
)

Reply = Callable[[bytes], bytes]
SUPPRESSED = {"privacy__outputs": {"metrics": "suppressed"}}


class Runner:
    """A study over a Grid in memory; it can be started again and again."""

    def __init__(self, folder: Path, plan: StudyPlan = PLAN, **replies: Reply) -> None:
        self.folder, self.plan, self.time, self.kept = folder, plan, Time(), Kept()
        good = {site: partial(reply, site=site, plan=plan) for site in SITES}
        sites = {11 + n: (good | replies)[site] for n, site in enumerate(SITES)}
        self.grid = MemoryGrid(sites, self.time)
        self.events: list[Event] = []

    @property
    def own(self) -> Path:
        return self.folder / "own"

    def run(self, state: StudyState | None = None, **options: Any) -> StudyState:
        study = Study(
            self.grid,
            self.plan,
            self.kept,
            nodes=3,
            clock=self.time.clock,
            scratch=self.folder / "scratch",
            own_models=self.own,
            **({"observe": self.events.append} | options),
        )
        return study.run(state or first_state(self.plan, tiny_model()))


def own_stages(state: StudyState) -> dict[str, dict[str, float | None]]:
    """Owner -> site -> Dice."""
    return {
        record.owner: {answer.site: answer.mean_dice for answer in record.answers}
        for record in state.history
        if record.owner is not None
    }


def before_last_round(kept: Kept) -> dict[str, Any]:
    """The shared model that the last round was trained from."""
    states = [s for s in kept.states if s.position is not None]
    found = next(s for s in states if (s.position.round, s.position.stage) == (ROUNDS, "train"))  # type: ignore[union-attr]
    return found.server.model


class TestPlan:
    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"aggregation__strategy": "fedbn"}, "keeps a part"),
            ({"aggregation__strategy": "fedper"}, "keeps a part"),
            ({"aggregation__strategy": "ditto", "aggregation__ditto_lambda": 0.1}, "keeps a part"),
            ({"aggregation__minimum_sites": 1}, "no other hospital"),
            (
                {"privacy": {"guarantee": "none", "outputs": {"metrics": "none"}}},
                "no hospital tell",
            ),
        ],
    )
    def test_own_models_are_refused_where_they_make_no_sense(
        self, changes: dict[str, Any], why: str
    ) -> None:
        StudyPlan.model_validate(values(**changes))
        with pytest.raises(ValueError, match=f"own_models: .*{why}"):
            StudyPlan.model_validate(values(evaluation__own_models=True, **changes))

    def test_noised_metrics_would_be_charged_for_nobody_knows_how_many(self) -> None:
        noised = {"privacy__outputs": {"metrics": "noised"}, "privacy__expected_validation": 2}
        StudyPlan.model_validate(private_values(**noised))
        with pytest.raises(ValueError, match=r"own_models: .*noised charges"):
            StudyPlan.model_validate(private_values(evaluation__own_models=True, **noised))
        StudyPlan.model_validate(private_values(evaluation__own_models=True, **SUPPRESSED))

    def test_a_plan_without_keeps_the_digest_that_it_had(self) -> None:
        assert b"own_models" not in built_plan().canonical_bytes
        assert b'"own_models":true' in PLAN.canonical_bytes
        again = StudyPlan.model_validate_json(PLAN.canonical_bytes)
        assert (again, again.digest) == (PLAN, PLAN.digest)
        assert StudyPlan.model_validate(values(evaluation__own_models=False)).digest == (
            StudyPlan.model_validate(values()).digest
        )

    @pytest.mark.parametrize("rule", [{"rule": "median"}, {"rule": "norm_bound", "norm": 0.1}])
    def test_every_rule_keeps_the_updates_as_they_came(
        self, rule: dict[str, Any], tmp_path: Path
    ) -> None:
        plan = built_plan(
            evaluation__own_models=True,
            aggregation__combine=rule,
            aggregation__weighting="uniform",
            aggregation__minimum_sites=3,
        )
        runner = Runner(tmp_path, plan)
        end = runner.run()
        shared = before_last_round(runner.kept)
        told = {a.site: a.own for r in end.history for a in r.answers if a.own}
        assert told == {site: expected_own(shared, site) for site in SITES}


class TestStore:
    def test_what_is_kept_comes_back_and_is_for_the_owner_of_the_folder_alone(
        self, tmp_path: Path
    ) -> None:
        store, model = OwnModels(tmp_path / "own", PLAN), tiny_model(3)
        consent = consent_of("site_a", digest_of(model))
        store.keep(LetGo(consent=consent), model)
        assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
        (file,) = (tmp_path / "own").iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        found, tensors = store.load("site_a", consent.model)
        assert (found.consent, digest_of(tensors)) == (consent, consent.model)
        store.keep(LetGo(consent=consent_of("site_b", digest_of(model))), model)
        (tmp_path / "own" / "site_a.own.part").write_bytes(b"what a crash left")
        store.keep_only(["site_a", "site_c"])
        assert list((tmp_path / "own").iterdir()) == [file]
        store.keep_only([])
        store.keep_only([])
        assert not (tmp_path / "own").exists()

    def test_another_one_a_damaged_one_and_none_are_lost(self, tmp_path: Path) -> None:
        store, model = OwnModels(tmp_path / "own", PLAN), tiny_model(3)
        consent = consent_of("site_a", digest_of(model))
        with pytest.raises(LostModelError, match="cannot be read"):
            store.load("site_a", consent.model)
        store.keep(LetGo(consent=consent), model)
        with pytest.raises(LostModelError, match="not the one"):
            store.load("site_a", "0" * 64)
        (file,) = (tmp_path / "own").iterdir()
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(LostModelError, match="not the one"):
            store.load("site_a", consent.model)
        file.write_bytes(data[:-1])
        with pytest.raises(LostModelError, match="damaged"):
            store.load("site_a", consent.model)
        file.rename(file.with_name("site_b.own")).write_bytes(data)
        with pytest.raises(LostModelError, match="not the one"):
            store.load("site_b", consent.model)

    @given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9), st.integers(0, 99))
    def test_an_own_model_is_the_sum_in_the_models_type_and_frozen_parts_stay(
        self, shared: list[float], seed: int
    ) -> None:
        old = np.asarray(shared, np.float32)
        step = np.random.default_rng(seed).normal(size=old.shape).astype(np.float32)
        found = own_model({"a": old, "frozen": old}, {"a": step})
        assert found["a"].dtype == np.float32 and found["frozen"] is old
        exact = old.astype(np.float64) + step.astype(np.float64)
        assert np.array_equal(found["a"], exact.astype(np.float32))


class TestConsent:
    def test_only_its_own_key_and_its_own_words_count(self) -> None:
        one, other = Party("site_a"), Party("site_b")
        good = consent_of("site_a", "1" * 64).signed(one.signing)
        good.require_signed(one.signing.public)
        bad = [
            good.signed(other.signing),
            consent_of("site_a", "1" * 64),
            *(
                good.model_copy(update=change)
                for change in (
                    {"model": "2" * 64},
                    {"plan": "2" * 64},
                    {"study": "other"},
                    {"site": "site_b"},
                )
            ),
        ]
        for each in bad:
            with pytest.raises(TrustError, match="has not consented"):
                each.require_signed(one.signing.public)

    @pytest.mark.parametrize(
        "changes",
        [
            {"stage": "evaluate"},
            {"round": 2},
            {"consent": None},
            {"consent": consent_of("site_a", "1" * 64)},
            {"consent": consent_of("site_a", digest_of(tiny_model()), plan="1" * 64)},
            {"consent": consent_of("site_a", digest_of(tiny_model()), study="other")},
        ],
    )
    def test_a_task_brings_one_own_model_under_a_consent_to_just_that(
        self, changes: dict[str, Any]
    ) -> None:
        model = tiny_model()
        good = TaskHeader(
            study=PLAN.study,
            plan=PLAN.digest,
            round=ROUNDS,
            stage="own",
            attempt=1,
            model=digest_of(model),
            consent=consent_of("site_a", digest_of(model)),
        )
        header, _ = open_task(seal_task(good, model), PLAN)
        assert header.owner == "site_a"
        with pytest.raises(TrustError):
            open_task(seal_task(good.model_copy(update=changes), model), PLAN)

    def test_a_plan_without_own_models_opens_no_such_task(self) -> None:
        plan, model = built_plan(), tiny_model()
        header = TaskHeader(
            study=plan.study,
            plan=plan.digest,
            round=ROUNDS,
            stage="own",
            attempt=1,
            model=digest_of(model),
            consent=consent_of("site_a", digest_of(model), plan),
        )
        with pytest.raises(TrustError, match="does not say"):
            open_task(seal_task(header, model), plan)


class TestStudy:
    def test_each_own_model_is_measured_at_every_site_before_the_release(
        self, tmp_path: Path
    ) -> None:
        runner = Runner(tmp_path)
        end = runner.run()
        order = [(r.stage, r.owner) for r in end.history]
        assert order[-5:] == [
            ("evaluate", None),
            *(("own", site) for site in SITES),
            ("release", None),
        ]
        assert own_stages(end) == {
            owner: {site: pytest.approx(measured(owner, site)) for site in SITES} for owner in SITES
        }
        shared = before_last_round(runner.kept)
        for task in {task for _, task in runner.grid.tasks}:
            header, model = open_task(task, PLAN)
            if header.stage == "own":
                assert header.owner is not None
                assert digest_of(model) == header.model == expected_own(shared, header.owner)
        assert not runner.own.exists()

    def test_the_released_model_is_the_one_without(self, tmp_path: Path) -> None:
        plan = built_plan()
        without = run_purely(first_state(plan, tiny_model()), plan)[-1]
        end = Runner(tmp_path).run()
        assert digest_of(end.server.model) == digest_of(without.server.model)

    def test_a_site_that_does_not_consent_is_left_out_and_measures_the_others(
        self, tmp_path: Path
    ) -> None:
        runner = Runner(tmp_path, site_b=partial(reply, site="site_b", consents=False))
        end = runner.run()
        found = own_stages(end)
        assert set(found) == {"site_a", "site_c"}
        assert all(set(told) == set(SITES) for told in found.values())
        known = ownmodels.own_models(PLAN, end.history)
        assert known is not None and known.at_home == ("site_b",)
        assert "own model of site_b" in ownmodels.sentences(PLAN, known)[-1]

    def test_where_nobody_consents_nothing_is_kept_and_the_study_ends(self, tmp_path: Path) -> None:
        quiet = {site: partial(reply, site=site, consents=False) for site in SITES}
        runner = Runner(tmp_path, **quiet)
        opened: list[bool] = []
        end = runner.run(observe=lambda _event: opened.append(runner.own.exists()))
        assert own_stages(end) == {} and not any(opened)

    @pytest.mark.parametrize(
        "forged",
        [
            {"model": "0" * 64},
            {"plan": "0" * 64},
            {"site": "site_a"},
            {"study": "other"},
        ],
        ids=["model", "plan", "site", "study"],
    )
    def test_a_false_consent_makes_the_answer_malformed_and_nothing_of_it_counts(
        self, forged: dict[str, Any], tmp_path: Path
    ) -> None:
        runner = Runner(tmp_path, site_c=partial(reply, site="site_c", forged=forged))
        end = runner.run()
        (failure,) = [f for r in end.history for f in r.failures]
        assert (failure.site, failure.code) == ("site_c", "malformed")
        assert set(own_stages(end)) == {"site_a", "site_b"}
        absent = partial(_silent_in_the_last_training, site="site_c")
        without = Runner(tmp_path / "without", site_c=absent).run()
        assert digest_of(end.server.model) == digest_of(without.server.model)

    def test_a_consent_before_the_last_round_or_unasked_is_malformed(self, tmp_path: Path) -> None:
        def eager(task: bytes) -> bytes:
            header = peek(task, TaskHeader, max_bytes=10**7)
            if header.stage != "train":
                return reply(task, "site_c", plan)
            return _with_consent(task, plan)

        for plan, rounds in ((PLAN, [1, 2]), (built_plan(), [1, 2, 3])):
            end = Runner(tmp_path, plan, site_c=eager).run()
            failed = [(r.round, f.code) for r in end.history for f in r.failures]
            assert failed == [(round_, "malformed") for round_ in rounds]

    def test_a_plan_that_measures_them_needs_a_place_to_keep_them(self) -> None:
        with pytest.raises(ValueError, match="folder"):
            Study(MemoryGrid({}, Time()), PLAN, Kept(), nodes=3)


def _with_consent(task: bytes, plan: StudyPlan) -> bytes:
    """A training answer with a consent to just its own model, whatever the round."""
    header, model = open_task(task, plan)
    delta = train("site_c", header.round, model)
    consent = consent_of("site_c", digest_of(own_model(model, delta)), plan)
    body = body_of("train", 4).model_copy(update={"consent": consent})
    return answer(task_digest(task), "site_c", body, delta)


def _silent_in_the_last_training(task: bytes, site: str) -> bytes:
    header = peek(task, TaskHeader, max_bytes=10**7)
    return b"" if last(header) else reply(task, site)


class CrashError(RuntimeError):
    """The coordinator's process dies here."""


class TestKill:
    STAGES = 10

    @pytest.mark.parametrize("closed", range(STAGES))
    def test_a_coordinator_that_is_killed_after_any_stage_goes_on_with_the_same_bits(
        self, closed: int, tmp_path: Path
    ) -> None:
        whole = Runner(tmp_path / "whole").run()
        assert len(whole.history) == self.STAGES
        runner = Runner(tmp_path / "killed")
        path = tmp_path / "checkpoint"

        def die(state: StudyState) -> None:
            save_state(path, PLAN, state)
            if len(state.history) == closed + 1:
                raise CrashError

        runner.kept.save = die  # type: ignore[method-assign]
        with pytest.raises(CrashError):
            runner.run()
        runner.kept = Kept()
        end = runner.run(load_state(path, PLAN))
        assert end.history == whole.history
        assert digest_of(end.server.model) == digest_of(whole.server.model)
        assert not runner.own.exists()

    @pytest.mark.parametrize("at", range(6, STAGES + 1))
    def test_a_kill_while_a_stage_is_open_asks_with_the_same_bytes_again(
        self, at: int, tmp_path: Path
    ) -> None:
        runner = Runner(tmp_path)

        def die(event: Event) -> None:
            runner.events.append(event)
            if len([e for e in runner.events if isinstance(e, StageOpened)]) == at:
                raise CrashError

        with pytest.raises(CrashError):
            runner.run(observe=die)
        opened = runner.events[-1]
        assert isinstance(opened, StageOpened)
        end = runner.run(runner.kept.states[-1], observe=runner.events.append)
        again = [e for e in runner.events if isinstance(e, StageOpened) and e.stage != "enlist"]
        assert [e.digest for e in again].count(opened.digest) == 2
        assert set(own_stages(end)) == set(SITES)

    def test_a_model_that_the_disk_has_lost_is_named_and_holds_nothing_up(
        self, tmp_path: Path
    ) -> None:
        runner = Runner(tmp_path)

        def lose(event: Event) -> None:
            runner.events.append(event)
            if isinstance(event, StageClosed) and event.record.owner == "site_a":
                (runner.own / "site_b.own").unlink()

        end = runner.run(observe=lose)
        assert end.position is None
        found = own_stages(end)
        assert found["site_b"] == {} and set(found["site_c"]) == set(SITES)
        (failure,) = [f for r in end.history for f in r.failures]
        assert (failure.site, failure.code) == ("site_b", "lost")
        assert [e.owner for e in runner.events if isinstance(e, SiteFailed)] == ["site_b"]

    def test_a_model_that_is_lost_before_it_is_sent_again_holds_nothing_up(
        self, tmp_path: Path
    ) -> None:
        runner = Runner(tmp_path)

        def loses(task: bytes) -> bytes | Error:
            path = runner.own / "site_a.own"
            if peek(task, TaskHeader, max_bytes=10**7).owner == "site_a" and path.exists():
                path.unlink()
                return Error(code=5, reason="Node unavailable")
            return reply(task, "site_b")

        runner.grid.sites[12] = loses
        end = runner.run(reask=True)
        assert end.position is None
        assert own_stages(end)["site_a"] == {} and set(own_stages(end)["site_b"]) == set(SITES)
        assert [(f.site, f.code) for r in end.history for f in r.failures] == [("site_a", "lost")]

    def test_an_attempt_that_failed_leaves_no_model_that_is_measured(self, tmp_path: Path) -> None:
        """site_c answers the first attempt, which fails, and not the second."""
        tries: dict[str, int] = {}

        def fails_first(task: bytes, site: str) -> bytes:
            if last(peek(task, TaskHeader, max_bytes=10**7)):
                tries[site] = tries.get(site, 0) + 1
                if (tries[site] == 1) == (site != "site_c"):
                    return b""
            return reply(task, site)

        runner = Runner(tmp_path, **{site: partial(fails_first, site=site) for site in SITES})
        end = runner.run()
        assert [r.attempt for r in end.history if (r.round, r.stage) == (ROUNDS, "train")] == [1, 2]
        assert set(own_stages(end)) == {"site_a", "site_b"}
        assert not runner.own.exists()

    def test_what_is_kept_is_what_a_stage_to_come_measures(self, tmp_path: Path) -> None:
        """site_c consents in the attempt that fails alone; a kill comes before site_a's is gone."""
        tries: dict[str, int] = {}

        def at_first(task: bytes, site: str) -> bytes:
            if not last(peek(task, TaskHeader, max_bytes=10**7)):
                return reply(task, site)
            tries[site] = tries.get(site, 0) + 1
            if tries[site] == 1 and site != "site_c":
                return b""
            return reply(task, site, consents=tries[site] == 1 or site != "site_c")

        runner = Runner(tmp_path, **{site: partial(at_first, site=site) for site in SITES})
        kept: list[tuple[str | None, set[str]]] = []

        def look(event: Event) -> None:
            files = {path.stem for path in runner.own.glob("*")}
            if isinstance(event, StageClosed) and event.record.round == ROUNDS:
                kept.append((event.record.owner or event.record.stage, files))

        save = runner.kept.save

        def die(state: StudyState) -> None:
            save(state)
            if state.history[-1].owner == "site_a":
                raise CrashError

        runner.kept.save = die  # type: ignore[method-assign]
        with pytest.raises(CrashError):
            runner.run(observe=look)
        runner.kept.save = save  # type: ignore[method-assign]
        state = runner.kept.states[-1]
        seen: list[set[str]] = []
        runner.run(
            state, observe=lambda _event: seen.append({p.stem for p in runner.own.glob("*")})
        )
        both = {"site_a", "site_b"}
        assert kept == [("train", {"site_c"}), ("train", both), ("evaluate", both)]
        assert seen[0] == {"site_b"} and seen[-1] == set()


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


class Shown(Kept):
    """A store whose states a progress document shows."""

    def __init__(self, keeper: ProgressKeeper) -> None:
        super().__init__()
        self._keeper = keeper

    def save(self, state: StudyState) -> None:
        super().save(state)
        self._keeper.stored(state)


class TestTold:
    def test_the_progress_shows_whose_model_and_no_curve_takes_it_for_the_shared_one(
        self, tmp_path: Path
    ) -> None:
        start = first_state(PLAN, tiny_model())
        keeper = ProgressKeeper(tmp_path / "progress.json", PLAN, start, sites=SITES)
        left: list[float | None] = []
        runner = Runner(tmp_path)

        def look(event: Event) -> None:
            keeper(event)
            left.append(keeper.document().left_s)
            if isinstance(event, StageOpened):
                shown = keeper.document().open
                assert shown is not None and shown.owner == event.owner

        runner.kept = Shown(keeper)
        runner.run(observe=look)
        told = keeper.document()
        assert told.finished
        own = [s for s in told.stages if s.owner is not None]
        assert [s.dice for s in own] == [None] * 3
        assert own[1].own_dice == pytest.approx({site: measured("site_b", site) for site in SITES})
        curve = told.site("site_a")
        assert curve is not None and curve.dice[-1].value == pytest.approx(measured(None, "site_a"))

    def test_the_dashboard_says_how_each_own_model_fares(self, tmp_path: Path) -> None:
        start = first_state(PLAN, tiny_model())
        keeper = ProgressKeeper(tmp_path / "progress.json", PLAN, start, sites=SITES)
        runner = Runner(tmp_path)
        runner.kept = Shown(keeper)
        shown: list[str] = []

        def look(event: Event) -> None:
            keeper(event)
            if isinstance(event, StageOpened) and event.owner == "site_b":
                shown.append(render(PLAN, keeper.document(), Situation()))

        runner.run(observe=look)
        shown.append(render(PLAN, keeper.document(), Situation()))
        during, after = shown
        assert "Hospitals are measuring site_b’s own model" in during
        assert "site_a’s own model fares worst at site_a: Dice 0.100" in during
        assert "site_b’s own model fares" not in during
        assert all(f"{site}’s own model fares worst" in after for site in SITES)

    @pytest.mark.parametrize("home", [("site_c",), SITES])
    def test_the_dashboard_names_whose_own_model_stayed_at_home(
        self, home: tuple[str, ...], tmp_path: Path
    ) -> None:
        start = first_state(PLAN, tiny_model())
        keeper = ProgressKeeper(tmp_path / "progress.json", PLAN, start, sites=SITES)
        silent = {site: partial(reply, site=site, consents=False) for site in home}
        runner = Runner(tmp_path, **silent)
        runner.kept = Shown(keeper)
        runner.run(observe=keeper)
        page = render(PLAN, keeper.document(), Situation())
        who = "site_c" if len(home) == 1 else "site_a, site_b and site_c"
        assert f"did not consent: the own model of {who}." in page
        assert ownmodels.NOT_YET not in page

    def test_who_gave_no_last_update_is_named_and_nobody_before_the_round_is_over(
        self, tmp_path: Path
    ) -> None:
        """site_c alone answers the first attempt, and not the second, which counts."""
        tries: dict[str, int] = {}

        def in_turn(task: bytes, site: str) -> bytes:
            if last(peek(task, TaskHeader, max_bytes=10**7)):
                tries[site] = tries.get(site, 0) + 1
                if (tries[site] == 1) != (site == "site_c"):
                    return answer(task_digest(task), site, Refused(code="failed"), None)
            return reply(task, site, consents=site != "site_c")

        start = first_state(PLAN, tiny_model())
        keeper = ProgressKeeper(tmp_path / "progress.json", PLAN, start, sites=SITES)
        runner = Runner(tmp_path, **{site: partial(in_turn, site=site) for site in SITES})
        runner.kept = Shown(keeper)
        pages: list[str] = []

        def look(event: Event) -> None:
            keeper(event)
            if isinstance(event, StageClosed) and (event.record.round, event.record.stage) == (
                ROUNDS, "train",
            ):  # fmt: skip
                pages.append(render(PLAN, keeper.document(), Situation()))
                known = ownmodels.own_models(PLAN, runner.kept.states[-1].history)
                assert (known is None) == (len(pages) == 1)

        end = runner.run(observe=look)
        pages.append(render(PLAN, keeper.document(), Situation()))
        said = ownmodels.sentences(PLAN, ownmodels.own_models(PLAN, end.history))
        missing = "No update of the last round, so no own model: site_c."
        assert [ownmodels.NOT_YET in page for page in pages] == [True, True, False]
        assert [missing in page for page in pages] == [False, False, True] and missing in said
        assert not [page for page in (*pages, *said) if "did not consent" in page]

    def test_the_worst_comes_first_then_the_spread_then_the_mean(self, tmp_path: Path) -> None:
        found = ownmodels.own_models(PLAN, Runner(tmp_path).run().history)
        assert found is not None
        assert list(found.measured) == list(SITES)  # by the worst hospital of each
        said = ownmodels.sentences(PLAN, found)[1]
        assert said.startswith("site_a’s own model fares worst at site_a: Dice 0.100; the standard")
        assert said.index("standard deviation") < said.index("mean 0.110") < said.index("At home")

    def test_what_is_recorded_agrees_with_the_stages(self, tmp_path: Path) -> None:
        history = Runner(tmp_path).run().history
        rows = ownmodels.recorded(ownmodels.own_models(PLAN, history), history)
        assert [row.site for row in rows] == list(SITES)
        for row in rows:
            for site in SITES:
                assert row.scores[site] == {"dice": pytest.approx(measured(row.site, site))}

    def test_before_the_last_round_and_in_other_plans_the_words_say_so(self) -> None:
        plan = built_plan()
        assert "passed on" in ownmodels.sentences(plan, ownmodels.own_models(plan, ()))[0]
        assert (
            "After the last round" in ownmodels.sentences(PLAN, ownmodels.own_models(PLAN, ()))[0]
        )


def test_stages_to_come_grow_when_consents_are_there(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    runner.run()
    start, trained = runner.kept.states[0], runner.kept.states[4]
    assert [p.stage for p in ahead(start.position, PLAN, start.history)].count("own") == 0
    assert [p.owner for p in ahead(trained.position, PLAN, trained.history)] == [
        None,
        *SITES,
        None,
    ]
    own = next(s for s in runner.kept.states if s.position and s.position.stage == "own")
    with pytest.raises(ValueError, match="nobody said where"):
        open_stage(own, PLAN)


def test_a_private_answer_is_as_long_with_a_consent_as_without() -> None:
    plan = StudyPlan.model_validate(private_values(evaluation__own_models=True, **SUPPRESSED))
    plan = plan.model_copy(update={"initial": PLAN.initial})
    given = consent_of("site_a", "1" * 64, plan)
    sizes = set()
    for consent in (None, given, given.signed(Party("site_a").signing)):
        body = Trained(patients=None, steps=20, loss=None, consent=consent)
        header = AnswerHeader(task="0" * 64, site="site_a", body=body)
        sizes.add(len(seal_answer(header, tiny_model(), plan)))
    assert len(sizes) == 1
