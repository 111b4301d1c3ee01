"""A robust rule in the coordinator's loop: its scratch folder, a full disk, the finished record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from memory_grid import Kept, MemoryGrid, Time
from pure_studies import SITES, reply, run_purely
from small_plans import built_plan, tiny_model

from coordinator.rounds.events import Event, SiteAnswered, SiteFailed, nobody
from coordinator.rounds.study import Study
from fedseg.aggregation.checkpoint import load_state, save_state
from fedseg.aggregation.rounds import StudyState, first_state
from fedseg.aggregation.spill import Spill
from fedseg.arrays import Arrays, digest_of
from fedseg.errors import StorageError

PLAN = built_plan(
    aggregation__combine={"rule": "median"},
    aggregation__weighting="uniform",
    aggregation__minimum_sites=3,
)


def loop(scratch: Path | None, kept: Kept, observe: Any = nobody) -> Study:
    time = Time()
    sites = {
        11 + n: lambda task, site=site: reply(task, site, PLAN) for n, site in enumerate(SITES)
    }
    return Study(
        MemoryGrid(sites, time),
        PLAN,
        kept,
        nodes=3,
        observe=observe,
        clock=time.clock,
        scratch=scratch,
    )


def begin() -> StudyState:
    return first_state(PLAN, tiny_model())


def test_a_study_over_a_grid_ends_as_the_pure_one_and_leaves_no_update(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, SiteAnswered) and event.stage == "train":
            seen.append(len(list((tmp_path / "scratch").iterdir())))

    last = loop(tmp_path / "scratch", Kept(), look).run(begin())
    pure = run_purely(begin(), PLAN, scratch=tmp_path / "pure")[-1]
    assert digest_of(last.server.model) == digest_of(pure.server.model)
    assert seen == [1, 2, 3] * 3
    assert not (tmp_path / "scratch").exists()


def test_what_a_crash_left_is_removed_at_the_start_even_of_a_finished_study(
    tmp_path: Path,
) -> None:
    last = loop(tmp_path / "scratch", Kept()).run(begin())
    left = Spill(tmp_path / "scratch", PLAN.built.updated)
    left.put("site_a", tiny_model())
    loop(tmp_path / "scratch", Kept()).run(last)
    assert not (tmp_path / "scratch").exists()


def test_a_full_disk_ends_the_run_blames_no_site_and_loses_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, blamed, kept = Spill.put, [], Kept()

    def full(spill: Spill, site: str, update: Arrays) -> None:
        if len(kept.states) >= 2 and len(spill.sites) == 1:
            raise StorageError("no room for a site's update")
        put(spill, site, update)

    def blame(event: Event) -> None:
        if isinstance(event, SiteFailed):
            blamed.append(event)

    with monkeypatch.context() as patch:
        patch.setattr(Spill, "put", full)
        with pytest.raises(StorageError, match="no room"):
            loop(tmp_path / "scratch", kept, blame).run(begin())
    assert blamed == []
    assert not (tmp_path / "scratch").exists()
    stopped = kept.states[-1]
    assert stopped.position is not None
    at = stopped.position
    assert (at.round, at.stage, at.attempt) == (2, "train", 1)
    finished = loop(tmp_path / "scratch", Kept()).run(stopped)
    pure = run_purely(begin(), PLAN, scratch=tmp_path / "pure")[-1]
    assert digest_of(finished.server.model) == digest_of(pure.server.model)


def test_a_robust_plan_without_a_scratch_folder_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="scratch folder"):
        loop(None, Kept()).run(begin())


def test_how_updates_compare_survives_the_checkpoint(tmp_path: Path) -> None:
    last = loop(tmp_path / "scratch", Kept()).run(begin())
    save_state(tmp_path / "checkpoint", PLAN, last)
    assert load_state(tmp_path / "checkpoint", PLAN).history == last.history
    trained = [a for r in last.history if r.stage == "train" for a in r.answers]
    assert len(trained) == 9
    assert all(a.update_norm and a.update_cosine and a.update_distance for a in trained)
    others = [a for r in last.history if r.stage != "train" for a in r.answers]
    assert all(a.update_norm is None for a in others)
