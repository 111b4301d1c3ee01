"""The coordinator's loop over a Grid in memory: every way in which a site can fail a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, RecordDict
from memory_grid import Answer, Kept, MemoryGrid, Site, Time
from pure_studies import SITES, reply, run_purely
from small_plans import answer, body_of, built_plan, tiny_model

from coordinator.rounds.asking import LONGEST_POLL_S, Clock
from coordinator.rounds.events import (
    Event,
    SiteAnswered,
    SiteFailed,
    StageClosed,
    StageOpened,
    nobody,
)
from coordinator.rounds.study import Study
from fedseg.aggregation.accumulate import MAX_WEIGHT
from fedseg.aggregation.rounds import Position, StudyState, first_state, fresh_attempts
from fedseg.arrays import digest_of
from fedseg.carriage import wrap
from fedseg.errors import RoundError
from fedseg.plan import StudyPlan
from fedseg.updates import (
    Evaluated,
    Refused,
    TaskHeader,
    Trained,
    open_task,
    peek,
    task_digest,
)

PLAN = built_plan()


def good(site: str, plan: StudyPlan = PLAN) -> Site:
    return lambda task: reply(task, site, plan)


def only_in(stage: str, fault: Site, site: str, round_: int | None = None) -> Site:
    """A site that is good but for one stage."""

    def answer_(task: bytes) -> Any:
        header = peek(task, TaskHeader, max_bytes=10**7)
        due = header.stage == stage and round_ in (None, header.round)
        return fault(task) if due else reply(task, site, PLAN)

    return answer_


def study(
    sites: Mapping[int, Site],
    *,
    plan: StudyPlan = PLAN,
    nodes: int | None = None,
    state: StudyState | None = None,
    observe: Callable[[Event], None] = nobody,
) -> tuple[StudyState, MemoryGrid, Kept]:
    """Run a study to its end."""
    time, kept = Time(), Kept()
    grid = MemoryGrid(sites, time)
    expected = len(sites) if nodes is None else nodes
    runner = Study(grid, plan, kept, nodes=expected, observe=observe, clock=time.clock)
    last = runner.run(state or first_state(plan, tiny_model()))
    return last, grid, kept


def three(**others: Site) -> dict[int, Site]:
    """The three good sites at nodes 11, 12, 13; `c=...` replaces the last one."""
    return {11 + n: others.get(site[-1], good(site)) for n, site in enumerate(SITES)}


def failures(state: StudyState) -> list[tuple[int, str, str, str]]:
    return [(r.round, r.stage, f.site, f.code) for r in state.history for f in r.failures]


UNDISTURBED = run_purely(first_state(PLAN, tiny_model()), PLAN)[-1]


def test_a_study_over_a_grid_ends_as_the_pure_one() -> None:
    last, grid, kept = study(three())
    assert last.position is None
    assert digest_of(last.server.model) == digest_of(UNDISTURBED.server.model)
    assert [s.position for s in kept.states][-1] is None
    assert len(kept.states) == len(last.history) == 7
    assert failures(last) == []
    assert len(grid.tasks) == 3 * 7


def test_every_site_of_a_round_gets_the_same_bytes() -> None:
    _, grid, _ = study(three())
    for start in range(0, len(grid.tasks), 3):
        assert len({task for _, task in grid.tasks[start : start + 3]}) == 1


def test_answers_in_any_order_give_the_same_bits() -> None:
    def slow(site: str, seconds: float) -> Site:
        return lambda task: (seconds, reply(task, site, PLAN))

    for delays in ((0.0, 1.0, 2.0), (2.0, 1.0, 0.0), (1.0, 0.001, 50.0)):
        sites = {7 - n: slow(s, d) for n, (s, d) in enumerate(zip(SITES, delays, strict=True))}
        last, _, _ = study(sites)
        assert digest_of(last.server.model) == digest_of(UNDISTURBED.server.model)
        assert last.history == study(three())[0].history


def test_the_record_says_what_moved() -> None:
    last, grid, _ = study(three())
    record = last.history[1]
    assert record.bytes_down == 3 * len(grid.tasks[3][1])
    assert record.bytes_up == sum(a.bytes_up for a in record.answers) > 0
    assert [(a.site, a.patients, a.loss) for a in record.answers] == [
        ("site_a", 2, 0.5),
        ("site_b", 3, 0.5),
        ("site_c", 4, 0.5),
    ]
    assert last.history[3].answers[0].mean_dice == 0.5


class FlowerCodes:
    """Flower's error codes as this coordinator tells them."""

    CASES = {0: "crashed", 1: "crashed", 2: "crashed", 3: "expired", 4: "expired"} | {
        5: "unavailable",
        6: "crashed",
        8: "crashed",
        99: "crashed",
    }


@pytest.mark.parametrize(("flower", "code"), FlowerCodes.CASES.items())
def test_flowers_errors_become_coarse_codes(flower: int, code: str) -> None:
    faulty = only_in("train", lambda _task: Error(code=flower, reason="/data/0815"), "site_c", 2)
    last, _, _ = study(three(c=faulty))
    assert failures(last) == [(2, "train", "site_c", code)]
    assert "0815" not in repr(last.history)


def nan(task: bytes) -> bytes:
    delta = {name: np.full_like(array, np.nan) for name, array in tiny_model().items()}
    return answer(task_digest(task), "site_c", body_of("train"), delta)


def trained(delta: Any = None, site: str = "site_c", **body: Any) -> Site:
    said = Trained.model_validate({"patients": 4, "steps": 20, "loss": 0.5} | body)
    return lambda task: answer(task_digest(task), site, said, delta or tiny_model())


FAULTS: dict[str, tuple[Site, str]] = {
    "nan": (nan, "not_finite"),
    "garbage": (lambda _task: b"garbage", "malformed"),
    "empty": (lambda _task: b"", "malformed"),
    "the task itself": (lambda task: task, "malformed"),
    "other content": (
        lambda _task: RecordDict({"fedseg": ConfigRecord({"a": 1})}),
        "malformed",
    ),
    "two records": (
        lambda task: RecordDict({**wrap(task), "more": ConfigRecord({"a": 1})}),
        "malformed",
    ),
    "no content": (lambda _task: RecordDict(), "malformed"),
    "oversized": (lambda _task: bytes(2**21), "malformed"),
    "wrong names": (trained({"x": np.zeros(1, np.float32)}), "malformed"),
    "another site": (trained(site="site_a"), "site"),
    "an unknown site": (trained(site="site_d"), "site"),
    "another task": (lambda task: answer("0" * 64, "site_c", body_of("enlist")), "stale"),
    "another stage": (
        lambda task: answer(task_digest(task), "site_c", body_of("enlist")),
        "stage",
    ),
    "no patients": (trained(patients=0), "data"),
    "too many patients": (trained(patients=2**31 - 1), "data"),
    "more patients than fit": (trained(patients=MAX_WEIGHT + 1), "data"),
    "huge values": (
        trained({k: np.full_like(v, 1e30) for k, v in tiny_model().items()}),
        "overflow",
    ),
    "refused": (
        lambda task: answer(task_digest(task), "site_c", Refused(code="data")),
        "data",
    ),
    "nothing": (lambda _task: None, "timeout"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_site_that_fails_is_named_and_the_round_goes_on_without_it(fault: str) -> None:
    site, code = FAULTS[fault]
    last, _, _ = study(three(c=only_in("train", site, "site_c", 2)))
    assert last.position is None
    assert failures(last) == [(2, "train", "site_c", code)]
    two = run_purely(
        first_state(PLAN, tiny_model()),
        PLAN,
        failing=lambda s: ("site_c",) if s.position == Position(round=2, stage="train") else (),
    )[-1]
    assert digest_of(last.server.model) == digest_of(two.server.model)


@pytest.mark.parametrize("patients", [1, None])
def test_a_hospital_whose_patients_withdrew_stays_in_the_study(patients: int | None) -> None:
    plan = built_plan(aggregation__weighting="uniform")
    fewer = trained(patients=patients)
    sites = {n: good(name, plan) for n, name in zip((11, 12), SITES, strict=False)}

    def left(task: bytes) -> Any:
        header = peek(task, TaskHeader, max_bytes=10**7)
        due = (header.stage, header.round) == ("train", 2)
        return fewer(task) if due else reply(task, "site_c", plan)

    last, _, _ = study(sites | {13: left}, plan=plan)
    assert failures(last) == []
    (record,) = [r for r in last.history if (r.round, r.stage) == (2, "train")]
    assert record.answers[-1].patients == patients


def test_an_answer_that_comes_late_is_never_looked_at() -> None:
    late = only_in("train", lambda task: (61.0, reply(task, "site_c", PLAN)), "site_c", 1)
    last, grid, _ = study(three(c=late))
    assert failures(last) == [(1, "train", "site_c", "timeout")]
    assert len(grid.replies) == 1


def test_an_answer_just_in_time_counts() -> None:
    slow = only_in("train", lambda task: (59.5, reply(task, "site_c", PLAN)), "site_c", 1)
    last, _, _ = study(three(c=slow))
    assert failures(last) == []


def test_a_stage_with_too_few_answers_is_asked_again_and_both_are_recorded() -> None:
    asked: list[int] = []

    def once(task: bytes) -> Answer:
        asked.append(1)
        return None if len(asked) == 1 else reply(task, "site_b", PLAN)

    sites = three(b=only_in("train", once, "site_b", 2))
    sites[13] = only_in("train", lambda _task: b"", "site_c", 2)
    last, _, _ = study(sites)
    attempts = [
        (r.attempt, len(r.answers)) for r in last.history if (r.round, r.stage) == (2, "train")
    ]
    assert attempts == [(1, 1), (2, 2)]


def test_a_study_stops_when_attempts_are_exhausted_and_goes_on_when_sites_are_mended() -> None:
    broken = {
        node: only_in("train", lambda _task: None, s, 2)
        for node, s in ((12, "site_b"), (13, "site_c"))
    }
    kept, time = Kept(), Time()
    runner = Study(MemoryGrid(three() | broken, time), PLAN, kept, nodes=3, clock=time.clock)
    with pytest.raises(RoundError, match=r"site_b \(timeout\), site_c \(timeout\)"):
        runner.run(first_state(PLAN, tiny_model()))
    assert kept.states[-1].position == Position(round=2, stage="train", attempt=3)
    last, grid, _ = study(three(), state=fresh_attempts(kept.states[-1], PLAN))
    assert digest_of(last.server.model) == digest_of(UNDISTURBED.server.model)
    assert open_task(grid.tasks[0][1], PLAN)[0].stage == "enlist"


def test_from_every_kept_state_a_new_run_ends_with_the_same_bits() -> None:
    _, _, kept = study(three())
    for state in kept.states:
        last, _, _ = study(three(), state=state)
        assert digest_of(last.server.model) == digest_of(UNDISTURBED.server.model)
        assert last.history == kept.states[-1].history


def test_two_nodes_cannot_claim_one_site() -> None:
    last, grid, _ = study(three() | {14: good("site_a")})
    assert failures(last) == [(0, "enlist", "node-14", "site")]
    assert [node for node, _ in grid.tasks].count(14) == 1
    assert digest_of(last.server.model) == digest_of(UNDISTURBED.server.model)


def test_a_node_that_did_not_enlist_is_asked_nothing_else() -> None:
    for stranger in (lambda _task: b"garbage", lambda _task: None):
        last, grid, _ = study(three() | {14: stranger})
        assert [f[2] for f in failures(last)] == ["node-14"]
        assert [node for node, _ in grid.tasks].count(14) == 1


def test_a_study_waits_a_round_for_missing_nodes_and_then_begins_with_those_there() -> None:
    last, grid, _ = study({11: good("site_a"), 12: good("site_b")}, nodes=3)
    assert last.position is None
    assert 60 <= grid.time.now <= 60 + 2 * LONGEST_POLL_S + 1


def test_too_few_nodes_stop_the_study_before_any_training() -> None:
    with pytest.raises(RoundError, match="stage enlist: 2 sites must answer, 1 did"):
        study({11: good("site_a")}, nodes=3)


def test_a_node_that_leaves_is_missed_only_if_too_few_remain() -> None:
    sites = three()
    grid = MemoryGrid(sites, Time())

    def leave(event: Event) -> None:
        if isinstance(event, StageClosed) and event.record.round == 1:
            grid.sites.pop(13, None)

    runner = Study(grid, PLAN, Kept(), nodes=3, observe=leave, clock=grid.time.clock)
    last = runner.run(first_state(PLAN, tiny_model()))
    assert [len(r.answers) for r in last.history] == [3, 3, 2, 2, 2, 2, 2]


def test_waiting_polls_without_spinning_and_never_past_the_deadline() -> None:
    pauses: list[float] = []
    time = Time()
    clock = Clock(now=lambda: time.now, sleep=lambda s: (pauses.append(s), time.sleep(s))[0])
    grid = MemoryGrid(three(c=only_in("train", lambda _task: None, "site_c", 1)), time)
    Study(grid, PLAN, Kept(), nodes=3, clock=clock).run(first_state(PLAN, tiny_model()))
    assert max(pauses) <= LONGEST_POLL_S
    assert 60 <= time.now < 60.01
    assert len(pauses) < 60 / LONGEST_POLL_S + 20


def test_whoever_watches_is_told_of_everything_in_order() -> None:
    events: list[Event] = []
    study(three(c=only_in("train", nan, "site_c", 1)), observe=events.append)
    kinds = [type(event) for event in events[:10]]
    assert kinds == [
        StageOpened,
        *[SiteAnswered] * 3,
        StageClosed,
        StageOpened,
        *[SiteAnswered] * 2,
        SiteFailed,
        StageClosed,
    ]


def test_words_of_a_site_cannot_break_the_record() -> None:
    scores: Any = {"dice": {"\N{SNOWMAN}" * 50: 1.0}}
    said = Evaluated(patients=1, scores=scores)
    liar = only_in("evaluate", lambda t: answer(task_digest(t), "site_c", said), "site_c")
    last, _, _ = study(three(c=liar))
    assert [f[3] for f in failures(last)] == ["malformed", "malformed"]
    assert all(f.reason.isascii() for r in last.history for f in r.failures)
