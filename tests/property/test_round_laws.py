"""Whatever the network does to tasks and answers: no update counts twice, none counts wrongly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Error, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_grid import Kept, MemoryGrid, Time
from pure_studies import SITES, reply, run_purely
from small_plans import built_plan, tiny_model

from coordinator.rounds.events import Event, StageClosed
from coordinator.rounds.study import Study
from fedseg.aggregation.rounds import StudyState, first_state, fresh_attempts
from fedseg.arrays import digest_of
from fedseg.carriage import unwrap, wrap
from fedseg.errors import RoundError

PLAN = built_plan()
START = first_state(PLAN, tiny_model())
NODES = {11 + n: site for n, site in enumerate(SITES)}

FATES = st.one_of(
    st.just(("good", 0.0)),
    st.tuples(st.just("late"), st.floats(0.01, 90.0)),
    st.tuples(st.just("code"), st.sampled_from([0, 2, 3, 4, 5, 8])),
    st.just(("lost", 0.0)),
    st.tuples(st.just("older"), st.integers(0, 50)),
    st.just(("garbled", 0.0)),
    st.tuples(st.just("away"), st.floats(0.1, 70.0)),
    st.tuples(st.just("cut"), st.floats(2.0, 20.0)),
)


class CrashError(RuntimeError):
    """The coordinator's process dies here."""


class WildGrid(MemoryGrid):
    """Does to each message what fate says: delays, loses, swaps, garbles it, or takes the node."""

    def __init__(self, fates: list[tuple[str, Any]], time: Time) -> None:
        super().__init__({node: lambda _task: None for node in NODES}, time)
        self.fates = list(fates)
        self.before: list[bytes] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        whole = list(messages)
        ids = list(super().push_messages(whole))
        for message_id, message in zip(ids, whole, strict=True):
            self._suffer(message_id, message)
        return ids

    def _suffer(self, message_id: str, message: Message) -> None:
        node = message.metadata.dst_node_id
        good = reply(unwrap(message), NODES[node], PLAN)
        fate, how = self.fates.pop(0) if self.fates else ("good", 0.0)
        if fate in ("good", "late"):
            self.reply(message_id, wrap(good), how)
        elif fate == "code":
            self.reply(message_id, Error(code=how, reason="fate"))
        elif fate == "older" and self.before:
            self.reply(message_id, wrap(self.before[how % len(self.before)]))
        elif fate == "garbled":
            self.reply(message_id, wrap(good[:-1]))
        elif fate == "away":
            self.away.add(node)
            self.time.due.append((self.time.now + how, lambda: self.away.discard(node)))
            self.reply(message_id, wrap(good), how / 2)
        elif fate == "cut":
            self.hidden.add(node)
            self.time.due.append((self.time.now + how, lambda: self.hidden.discard(node)))
            self.reply(message_id, wrap(good), how + 6)
        self.before.append(good)


def run_wildly(
    grid: WildGrid, crashes: set[int], *, reask: bool
) -> tuple[StudyState, list[StudyState]]:
    """Run to the end through crashes after closed stages and exhausted attempts; all states."""
    kept, state = Kept(), START
    for _ in range(40):

        def die(event: Event) -> None:
            if isinstance(event, StageClosed) and len(kept.states) in crashes:
                raise CrashError

        try:
            runner = Study(
                grid, PLAN, kept, nodes=3, reask=reask, observe=die, clock=grid.time.clock
            )
            return runner.run(state), kept.states
        except (RoundError, CrashError):
            state = fresh_attempts(kept.states[-1] if kept.states else START, PLAN)
    raise AssertionError("a study whose network is good again must end")


def as_recorded(history: StudyState) -> StudyState:
    """The study in which exactly the recorded sites answered, without any network."""
    records = list(history.history)

    def failing(state: StudyState) -> tuple[str, ...]:
        assert state.position is not None
        record = records[len(state.history)]
        answered = {answer.site for answer in record.answers}
        return tuple(site for site in SITES if site not in answered)

    state = START
    while state.position is not None:
        state = run_purely(fresh_attempts(state, PLAN), PLAN, failing=failing, most_stages=1)[-1]
    return state


@settings(max_examples=60)
@given(st.lists(FATES, max_size=60), st.sets(st.integers(1, 12), max_size=4), st.booleans())
def test_the_model_is_that_of_the_recorded_answers_each_counted_once(
    fates: list[tuple[str, Any]], crashes: set[int], reask: bool
) -> None:
    last, states = run_wildly(WildGrid(fates, Time()), crashes, reask=reask)
    assert last.position is None
    for record in last.history:
        names = [answer.site for answer in record.answers]
        assert names == sorted(set(names)) and set(names) <= set(SITES)
        assert not {failure.site for failure in record.failures} & set(names)
    pure = as_recorded(last)
    assert digest_of(last.server.model) == digest_of(pure.server.model)
    assert last.server.steps == PLAN.aggregation.rounds
    assert [r.attempt for r in pure.history] == [r.attempt for r in last.history]
    assert len(states) == len(last.history)
    assert last.history[-1].stage == "release"
