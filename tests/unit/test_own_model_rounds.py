"""The rounds of hospitals' own models: who measures what, and what kills leave."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error
from memory_grid import Kept, MemoryGrid, Time
from own_models import (
    PLAN,
    ROUNDS,
    Runner,
    before_last_round,
    consent_of,
    expected_own,
    last,
    measured,
    own_stages,
    reply,
)
from pure_studies import SITES, run_purely, train
from small_plans import answer, body_of, built_plan, tiny_model

from coordinator.rounds.events import Event, SiteFailed, StageClosed, StageOpened
from coordinator.rounds.study import Study
from fedseg.aggregation.checkpoint import load_state, save_state
from fedseg.aggregation.ownmodels import own_model
from fedseg.aggregation.rounds import StudyState, first_state
from fedseg.arrays import digest_of
from fedseg.plan import StudyPlan
from fedseg.reports import ownmodels
from fedseg.updates import (
    TaskHeader,
    open_task,
    peek,
    task_digest,
)


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
        self, closed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = Runner(tmp_path / "whole").run()
        assert len(whole.history) == self.STAGES
        runner = Runner(tmp_path / "killed")
        path = tmp_path / "checkpoint"

        def die(state: StudyState) -> None:
            save_state(path, PLAN, state)
            if len(state.history) == closed + 1:
                raise CrashError

        monkeypatch.setattr(runner.kept, "save", die)
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

    def test_what_is_kept_is_what_a_stage_to_come_measures(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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

        monkeypatch.setattr(runner.kept, "save", die)
        with pytest.raises(CrashError):
            runner.run(observe=look)
        monkeypatch.undo()
        state = runner.kept.states[-1]
        seen: list[set[str]] = []
        runner.run(
            state, observe=lambda _event: seen.append({p.stem for p in runner.own.glob("*")})
        )
        both = {"site_a", "site_b"}
        assert kept == [("train", set()), ("train", both), ("evaluate", both)]
        assert seen[0] == {"site_b"} and seen[-1] == set()
