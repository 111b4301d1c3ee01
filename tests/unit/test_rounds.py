"""A study as a state machine: its schedule, its retries, and going on from any stored state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pure_studies import SITES, answers_of, run_purely
from small_plans import built_plan, tiny_model

from fedseg.aggregation.checkpoint import load_state, save_state
from fedseg.aggregation.rounds import (
    Outcome,
    Position,
    StudyState,
    also_received,
    close_stage,
    enlist_task,
    first_state,
    fresh_attempts,
    missing_answers,
    open_stage,
    release_task,
    require_attempts_left,
    schedule,
)
from fedseg.arrays import digest_of
from fedseg.errors import PlanError, RoundError
from fedseg.result import SiteAnswer
from fedseg.updates import open_task

RULES = {
    "plain": {},
    "rich": {
        "aggregation__strategy": "fedavgm",
        "aggregation__server_momentum": 0.5,
        "aggregation__weight_averaging": 0.8,
        "aggregation__weighting": "uniform",
    },
}


def equal(one: StudyState, two: StudyState) -> bool:
    """Equal to the last bit, history included."""
    parts = [(s.server.model, s.server.momentum or {}, s.server.average or {}) for s in (one, two)]
    same = all(digest_of(a) == digest_of(b) for a, b in zip(*parts, strict=True))
    rest = [(s.position, s.history, s.server.steps) for s in (one, two)]
    return same and rest[0] == rest[1]


def test_the_schedule_follows_from_the_plan() -> None:
    assert list(schedule(built_plan())) == [
        (0, "enlist"),
        (1, "train"),
        (2, "train"),
        (2, "evaluate"),
        (3, "train"),
        (3, "evaluate"),
        (3, "release"),
    ]
    once = built_plan(aggregation__rounds=2, evaluation__every_rounds=9)
    assert list(schedule(once))[2:] == [(2, "train"), (2, "evaluate"), (2, "release")]


def test_a_study_passes_every_stage_once_and_ends() -> None:
    plan = built_plan()
    last = run_purely(first_state(plan, tiny_model()), plan)[-1]
    assert last.position is None
    assert [(r.round, r.stage) for r in last.history] == list(schedule(plan))
    assert {record.attempt for record in last.history} == {1}
    assert last.server.steps == 3
    with pytest.raises(ValueError, match="finished"):
        open_stage(last, plan)
    require_attempts_left(last, plan)


def test_a_study_starts_from_the_plans_model_alone() -> None:
    plan = built_plan()
    with pytest.raises(PlanError, match="not the one in the plan"):
        first_state(plan, tiny_model(1))


def test_enlisting_carries_no_model_and_is_the_same_when_resumed() -> None:
    plan = built_plan()
    task = open_stage(first_state(plan, tiny_model()), plan)
    assert task == enlist_task(plan)
    assert open_task(task, plan)[1] == {}


def test_training_carries_the_model_and_evaluation_the_released_one() -> None:
    plan = built_plan(**RULES["rich"])
    for state in run_purely(first_state(plan, tiny_model()), plan)[1:-1]:
        assert state.position is not None
        header, model = open_task(open_stage(state, plan), plan)
        released = state.server.released(plan.aggregation)
        expected = state.server.model if header.stage == "train" else released
        assert digest_of(model) == digest_of(expected)
        if header.stage == "evaluate":
            assert digest_of(released) != digest_of(state.server.model)


def test_the_last_stage_brings_every_site_the_released_model() -> None:
    plan = built_plan(**RULES["rich"])
    states = run_purely(first_state(plan, tiny_model()), plan)
    header, model = open_task(open_stage(states[-2], plan), plan)
    assert (header.round, header.stage) == (3, "release")
    assert digest_of(model) == digest_of(states[-1].server.released(plan.aggregation))


def test_a_site_that_missed_the_release_gets_the_same_task_later() -> None:
    plan = built_plan()
    away = run_purely(
        first_state(plan, tiny_model()),
        plan,
        failing=lambda s: ("site_b", "site_c") if s.position and late(s.position) else (),
    )
    last = away[-1]
    assert [f.site for f in last.history[-1].failures] == ["site_b", "site_c"]
    assert release_task(last, plan) == open_stage(away[-2], plan)
    came = SiteAnswer(site="site_c", patients=0, bytes_up=5)
    more = also_received(last, Outcome(7, (came,), ()))
    record = more.history[-1]
    assert [a.site for a in record.answers] == ["site_a", "site_c"]
    assert [f.site for f in record.failures] == ["site_b"]
    assert record.bytes_down == last.history[-1].bytes_down + 7
    assert more.history[:-1] == last.history[:-1] and more.server is last.server
    with pytest.raises(ValueError, match="not finished"):
        release_task(away[-2], plan)


def test_a_task_brings_each_site_the_last_head_of_its_ledger() -> None:
    plan = built_plan()
    states = run_purely(first_state(plan, tiny_model()), plan)
    heads = [f"{n:064x}" for n in range(len(states))]
    history = tuple(
        record.model_copy(
            update={
                "answers": tuple(
                    a.model_copy(update={"head": heads[n] if a.site == "site_a" else None})
                    for a in record.answers
                )
            }
        )
        for n, record in enumerate(states[-1].history)
    )
    for n, state in enumerate(states[:-1]):
        so_far = replace(state, history=history[:n])
        header = open_task(open_stage(so_far, plan), plan)[0]
        assert header.heads == ({"site_a": heads[n - 1]} if n else {})
    last = replace(states[-1], history=history)
    assert open_task(enlist_task(plan, None, last.history), plan)[0].heads == {"site_a": heads[n]}
    before = replace(states[-2], history=history[:-1])
    assert release_task(last, plan) == open_stage(before, plan)  # although some have received it


def late(position: Position) -> bool:
    return position.stage == "release"


def test_a_round_is_the_weighted_mean_by_hand() -> None:
    plan = built_plan()
    state = run_purely(first_state(plan, tiny_model()), plan, most_stages=1)[-1]
    outcome = answers_of(state, plan, SITES)
    closed = close_stage(state, plan, outcome)
    assert outcome.total is not None
    assert outcome.total.weight == 2 + 3 + 4
    for name, old in tiny_model().items():
        step = outcome.total.mean()[name]
        np.testing.assert_allclose(closed.server.model[name], old + step, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_from_every_stored_state_the_study_ends_with_the_same_bits(
    rule: str, tmp_path: Path
) -> None:
    plan = built_plan(**RULES[rule])
    states = run_purely(first_state(plan, tiny_model()), plan)
    for place, state in enumerate(states):
        path = tmp_path / f"{place}"
        save_state(path, plan, state)
        stored = load_state(path, plan)
        assert equal(stored, state)
        assert equal(run_purely(stored, plan, order=lambda s: s[::-1])[-1], states[-1])


def test_the_order_of_the_answers_leaves_no_trace() -> None:
    plan = built_plan()
    start = first_state(plan, tiny_model())
    forth = run_purely(start, plan)[-1]
    assert equal(run_purely(start, plan, order=sorted)[-1], forth)
    assert equal(run_purely(start, plan, order=lambda sites: sorted(sites)[::-1])[-1], forth)
    records = forth.history
    assert all([a.site for a in record.answers] == list(SITES) for record in records)


def test_failures_are_sorted_by_site() -> None:
    plan = built_plan(aggregation__minimum_sites=1)
    state = first_state(plan, tiny_model())
    closed = close_stage(state, plan, answers_of(state, plan, ["site_b"], ["site_c", "site_a"]))
    assert [f.site for f in closed.history[0].failures] == ["site_a", "site_c"]


def two_fail_in_round_2(state: StudyState) -> tuple[str, ...]:
    """Two sites are away in the first attempt of round 2's training."""
    at = state.position
    away = at is not None and (at.round, at.stage, at.attempt) == (2, "train", 1)
    return ("site_a", "site_b") if away else ()


def test_a_stage_that_too_few_answered_is_tried_again_from_the_same_model() -> None:
    plan = built_plan()
    start = first_state(plan, tiny_model())
    states = run_purely(start, plan, failing=two_fail_in_round_2)
    failed = next(s for s in states if s.position == Position(round=2, stage="train", attempt=2))
    before = states[states.index(failed) - 1]
    assert failed.server is before.server
    assert [f.site for f in failed.history[-1].failures] == ["site_a", "site_b"]
    assert [r.attempt for r in states[-1].history] == [1, 1, 1, 2, 1, 1, 1, 1]
    undisturbed = run_purely(start, plan)[-1]
    assert digest_of(states[-1].server.model) == digest_of(undisturbed.server.model)


def test_a_second_attempt_is_another_task() -> None:
    plan = built_plan()
    states = run_purely(first_state(plan, tiny_model()), plan, failing=two_fail_in_round_2)
    tasks = [open_stage(state, plan) for state in states if state.position is not None]
    assert len(set(tasks)) == len(tasks)


def test_a_stage_that_fails_as_often_as_allowed_stops_the_study_and_names_the_sites() -> None:
    plan = built_plan()
    states = run_purely(
        first_state(plan, tiny_model()),
        plan,
        failing=lambda s: ("site_a", "site_c") if s.position and s.position.round else (),
    )
    stopped = states[-1]
    assert stopped.position == Position(round=1, stage="train", attempt=3)
    with pytest.raises(RoundError, match=r"round 1, stage train: 2 sites must answer, 1 did, in 2"):
        require_attempts_left(stopped, plan)
    with pytest.raises(RoundError, match=r"site_a \(timeout\), site_c \(timeout\).*--resume"):
        require_attempts_left(stopped, plan)
    assert digest_of(stopped.server.model) == plan.built.digest
    again = fresh_attempts(stopped, plan)
    assert again.position == Position(round=1, stage="train", attempt=1)
    assert (again.server, again.history) == (stopped.server, stopped.history)
    end = run_purely(again, plan)[-1]
    undisturbed = run_purely(first_state(plan, tiny_model()), plan)[-1]
    assert digest_of(end.server.model) == digest_of(undisturbed.server.model)


def test_fresh_attempts_change_nothing_where_none_was_used() -> None:
    plan = built_plan()
    states = run_purely(first_state(plan, tiny_model()), plan)
    assert all(fresh_attempts(state, plan) is state for state in states)


@pytest.mark.parametrize(
    ("stage", "missing"), [("enlist", 2), ("train", 2), ("evaluate", 0), ("release", 0)]
)
def test_only_enlisting_and_training_hold_a_study_up(stage: Any, missing: int) -> None:
    outcome = Outcome(bytes_down=0, answers=(), failures=())
    assert missing_answers(stage, built_plan(), outcome) == missing


def test_an_evaluation_that_nobody_answers_is_recorded_and_passed() -> None:
    plan = built_plan()
    states = run_purely(
        first_state(plan, tiny_model()),
        plan,
        failing=lambda s: SITES if s.position and s.position.stage == "evaluate" else (),
    )
    assert states[-1].position is None
    assert [len(r.answers) for r in states[-1].history if r.stage == "evaluate"] == [0, 0]
