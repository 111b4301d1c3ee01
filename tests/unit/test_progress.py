"""The document that status and dashboard read: true to the history, and it survives a restart."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pure_studies import SITES, answers_of
from small_plans import built_plan, tiny_model

from coordinator.progress.document import load_progress
from coordinator.progress.keeper import ProgressKeeper
from coordinator.rounds.events import (
    Paused,
    Resumed,
    SiteAnswered,
    SiteFailed,
    StageClosed,
    StageOpened,
)
from fedseg.aggregation.rounds import (
    Outcome,
    StudyState,
    also_received,
    close_stage,
    first_state,
    schedule,
)
from fedseg.errors import TrustError
from fedseg.plan import StudyPlan
from fedseg.result import SiteAnswer, SiteFailure


class Clock:
    """A time that moves only when it is told to."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


def keeper_of(path: Path, plan: StudyPlan, state: StudyState, clock: Clock) -> ProgressKeeper:
    return ProgressKeeper(path, plan, state, sites=SITES, now=clock)


def run_stage(
    keeper: ProgressKeeper,
    plan: StudyPlan,
    state: StudyState,
    clock: Clock,
    *,
    failing: tuple[str, ...] = (),
    wall_s: float = 10.0,
) -> StudyState:
    """One stage as the round loop reports it, with scores as sites send them."""
    assert state.position is not None
    position = state.position
    keeper(StageOpened(position.round, position.stage, position.attempt, len(SITES)))
    outcome = answers_of(state, plan, [s for s in SITES if s not in failing], failing)
    outcome = Outcome(
        outcome.bytes_down,
        tuple(_scored(answer, position.stage, position.round) for answer in outcome.answers),
        outcome.failures,
        outcome.total,
    )
    for answer in outcome.answers:
        keeper(SiteAnswered(position.round, position.stage, answer))
    for failure in outcome.failures:
        keeper(SiteFailed(position.round, position.stage, failure))
    clock.wait(wall_s)
    state = close_stage(state, plan, outcome)
    keeper.stored(state)
    keeper(StageClosed(state.history[-1], wall_s))
    return state


def _scored(answer: SiteAnswer, stage: str, round_: int) -> SiteAnswer:
    if stage == "train":
        return answer.model_copy(update={"loss": 1.0 / round_})
    if stage == "evaluate":
        low = 0.1 * round_ + (0.3 if answer.site == "site_a" else 0.0)
        return answer.model_copy(update={"scores": {"dice": {"anterior": low, "posterior": None}}})
    return answer


def read(path: Path):  # type: ignore[no-untyped-def]
    found = load_progress(path)
    assert found is not None
    return found


def test_before_anything_happened_every_enrolled_site_is_there(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    keeper_of(path, plan, first_state(plan, tiny_model()), clock)
    found = read(path)
    assert (found.phase, found.rounds, found.rounds_closed) == ("waiting", 3, 0)
    assert [site.name for site in found.sites] == list(SITES)
    assert all(site.sighting.online is None for site in found.sites)
    assert found.left_s is None and found.checkpoint is None


def test_the_open_stage_says_who_is_waited_for(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    keeper = keeper_of(path, plan, first_state(plan, tiny_model()), clock)
    keeper(StageOpened(0, "enlist", 1, 3))
    keeper(SiteAnswered(0, "enlist", SiteAnswer(site="site_b", patients=5, bytes_up=70)))
    keeper(SiteFailed(0, "enlist", SiteFailure(site="site_c", code="plan", reason="no")))
    found = read(path)
    assert found.open.answered == ("site_b",)
    assert [f.site for f in found.open.failures] == ["site_c"]
    assert found.open.waiting_for == ("site_a",)
    assert found.site("site_b").patients == 5
    assert found.site("site_b").sighting.online is True
    assert found.site("site_b").bytes_up == 70
    keeper(SiteAnswered(0, "enlist", SiteAnswer(site="site_c", patients=5, bytes_up=70)))
    assert read(path).open.failures == (), "asked again, it answered"


def test_a_node_that_never_enlisted_is_no_site(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    keeper = keeper_of(path, plan, first_state(plan, tiny_model()), clock)
    keeper(StageOpened(0, "enlist", 1, 4))
    keeper(SiteFailed(0, "enlist", SiteFailure(site="node-42", code="timeout", reason="late")))
    assert read(path).open.failures[0].site == "node-42"
    assert read(path).site("node-42") is None


def test_curves_bytes_and_failures_are_those_of_the_history(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    state = first_state(plan, tiny_model())
    keeper = keeper_of(path, plan, state, clock)
    state = run_stage(keeper, plan, state, clock)
    state = run_stage(keeper, plan, state, clock, failing=("site_c",))
    state = run_stage(keeper, plan, state, clock)
    state = run_stage(keeper, plan, state, clock)
    assert [(r.round, r.stage) for r in state.history] == [
        (0, "enlist"),
        (1, "train"),
        (2, "train"),
        (2, "evaluate"),
    ]
    found = read(path)
    assert found.rounds_closed == 2
    a, c = found.site("site_a"), found.site("site_c")
    assert [(p.round, p.value) for p in a.loss] == [(1, 1.0), (2, 0.5)]
    assert [(p.round, p.value) for p in c.loss] == [(2, 0.5)]
    assert a.dice[0].value == pytest.approx(0.5) and c.dice[0].value == pytest.approx(0.2)
    assert found.stages[-1].dice == pytest.approx((0.5 + 0.2 + 0.2) / 3)
    assert (a.answers, a.failures, c.answers, c.failures) == (4, 0, 3, 1)
    assert c.last_failure.code == "timeout" and c.last_failure.round == 1
    assert a.bytes_up == sum(
        x.bytes_up for r in state.history for x in r.answers if x.site == a.name
    )
    assert sum(s.bytes_up for s in found.stages) == sum(r.bytes_up for r in state.history)


def test_the_time_left_is_the_usual_time_of_the_stages_to_come(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    state = first_state(plan, tiny_model())
    keeper = keeper_of(path, plan, state, clock)
    state = run_stage(keeper, plan, state, clock, wall_s=1.0)
    assert read(path).left_s is None, "no round was timed yet"
    state = run_stage(keeper, plan, state, clock, wall_s=100.0)
    assert read(path).left_s == pytest.approx(200.0), "two more of training, none measured yet"
    keeper(StageOpened(2, "train", 1, 3))
    clock.wait(30.0)
    assert keeper.document().left_s == pytest.approx(170.0)
    clock.wait(300.0)
    assert keeper.document().left_s == pytest.approx(100.0), "a late round is about to end"


def test_a_restart_keeps_times_and_everything_else_from_the_checkpoint(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    state = first_state(plan, tiny_model())
    keeper = keeper_of(path, plan, state, clock)
    for _ in range(3):
        state = run_stage(keeper, plan, state, clock)
    keeper.seen(SITES, {"site_a", "site_b"})
    before = read(path)
    keeper(StageOpened(2, "evaluate", 1, 3))
    clock.wait(600.0)
    again = keeper_of(path, plan, state, clock)
    after = read(path)
    assert (after.stages, after.started) == (before.stages, before.started)
    assert after.checkpoint == before.checkpoint
    assert after.open is None and after.phase == "waiting"
    assert after.site("site_a").sighting.last_seen == before.site("site_a").sighting.last_seen
    assert after.site("site_a").sighting.online is None, "nobody has looked yet"
    again.seen(SITES, {"site_c"})
    assert read(path).site("site_c").sighting.online is True


def test_without_the_document_before_only_times_are_lost(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    state = first_state(plan, tiny_model())
    keeper = keeper_of(path, plan, state, clock)
    for _ in range(3):
        state = run_stage(keeper, plan, state, clock)
    before = read(path)
    path.write_bytes(before.model_dump_json().encode()[:200])
    with pytest.raises(TrustError, match="remove it"):
        load_progress(path)
    keeper_of(path, plan, state, clock)
    after = read(path)
    assert all(stage.timing.wall_s is None for stage in after.stages)
    assert [s.model_copy(update={"timing": None}) for s in after.stages] == [
        s.model_copy(update={"timing": None}) for s in before.stages
    ]
    assert after.left_s is None


def test_a_document_of_another_plan_is_not_taken_over(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    keeper_of(path, plan, first_state(plan, tiny_model()), clock).say("failed", "as it was")
    clock.wait(60.0)
    other = built_plan(aggregation__rounds=4)
    keeper_of(path, other, first_state(other, tiny_model()), clock)
    assert read(path).started == "2026-01-01T12:01:00+00:00"


def test_a_study_to_its_end(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    state = first_state(plan, tiny_model())
    keeper = keeper_of(path, plan, state, clock)
    for _ in schedule(plan):
        state = run_stage(keeper, plan, state, clock)
    found = read(path)
    assert found.finished and found.rounds_closed == 3 and found.left_s == 0.0
    assert found.checkpoint.round == 3
    assert found.open is None


def test_a_release_that_is_offered_again_leaves_the_study_finished(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    state = first_state(plan, tiny_model())
    keeper = keeper_of(path, plan, state, clock)
    while state.position is not None:
        failing = ("site_c",) if state.position.stage == "release" else ()
        state = run_stage(keeper, plan, state, clock, failing=failing)
    assert read(path).stages[-1].answered == ("site_a", "site_b")
    keeper(StageOpened(3, "release", 1, 1, size=500))
    assert read(path).finished and read(path).open.waiting_for == ("site_c",)
    answer = SiteAnswer(site="site_c", patients=0, bytes_up=70)
    keeper(SiteAnswered(3, "release", answer))
    assert read(path).open.waiting_for == ()
    keeper.stored(also_received(state, Outcome(500, (answer,), ())))
    found = read(path)
    assert found.finished and found.open is None
    assert found.stages[-1].answered == SITES
    assert found.stages[-1].timing.wall_s == 10.0


def test_late_sites_sign_in_beside_the_stage_that_is_due(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    state = first_state(plan, tiny_model())
    keeper = keeper_of(path, plan, state, clock)
    state = run_stage(keeper, plan, state, clock)
    keeper(StageOpened(0, "enlist", 1, 1))
    assert read(path).open.waiting_for == ()
    keeper(StageOpened(1, "train", 1, 3, size=900))
    assert read(path).open.waiting_for == SITES
    before = read(path).site("site_a").bytes_down
    keeper(SiteAnswered(1, "train", SiteAnswer(site="site_a", patients=2, bytes_up=70)))
    assert read(path).site("site_a").bytes_down - before == 900


def test_a_pause_is_told(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    keeper = keeper_of(path, plan, first_state(plan, tiny_model()), clock)
    keeper(Paused())
    assert read(path).phase == "paused"
    keeper(Resumed())
    assert read(path).phase == "running"


def test_sites_that_enlist_beside_the_stages_leave_none_open(tmp_path: Path) -> None:
    """A coordinator that starts again while the study is paused, and one that offers the end."""
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    state = first_state(plan, tiny_model())
    keeper = keeper_of(path, plan, state, clock)
    state = run_stage(keeper, plan, state, clock)
    keeper(StageOpened(0, "enlist", 1, 3))
    keeper(Paused())
    assert (read(path).phase, read(path).open) == ("paused", None)
    while state.position is not None:
        state = run_stage(keeper, plan, state, clock)
    keeper(StageOpened(0, "enlist", 1, 1))
    keeper(SiteFailed(0, "enlist", SiteFailure(site="node-42", code="plan", reason="no")))
    assert read(path).finished and read(path).open is None


def test_who_was_enrolled_is_shown_and_who_was_revoked_is_not_waited_for(tmp_path: Path) -> None:
    plan, clock, path = built_plan(), Clock(), tmp_path / "progress.json"
    state = first_state(plan, tiny_model())
    keeper = keeper_of(path, plan, state, clock)
    state = run_stage(keeper, plan, state, clock)
    keeper.seen(["site_a", "site_b", "site_d"], ["site_a"])
    assert read(path).site("site_d").sighting.online is False
    keeper(StageOpened(1, "train", 1, 3))
    assert read(path).open.waiting_for == ("site_a", "site_b", "site_d")
    assert read(path).site("site_c").answers == 1, "its part in the study is not forgotten"


def test_a_full_disk_does_not_stop_the_study(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, clock = built_plan(), Clock()
    caplog.set_level("WARNING", "coordinator.progress.keeper")
    (tmp_path / "run").write_text("a file where the folder should be")
    path = tmp_path / "run" / "progress.json"
    keeper = keeper_of(path, plan, first_state(plan, tiny_model()), clock)
    keeper(StageOpened(0, "enlist", 1, 3))
    assert "out of date" in caplog.text
