"""Running a study: open a stage, send its task, fold the answers as they arrive, close, store.

One answer is held at a time. An answer that does not fit is refused and named, and the stage goes
on; a node that has not answered when the time is up is named too, and its late answer is never
looked at. The state is stored after every stage, before anything else happens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from coordinator.events import (
    Observer,
    SiteAnswered,
    SiteFailed,
    StageClosed,
    StageOpened,
    nobody,
)
from coordinator.roster import Roster
from fedseg.aggregation.accumulate import MeanAccumulator
from fedseg.aggregation.rounds import (
    Outcome,
    StudyState,
    close_stage,
    enlist_task,
    open_stage,
    require_attempts_left,
    weight_of,
)
from fedseg.carriage import MESSAGE_TYPE, unwrap, wrap
from fedseg.errors import RoundError, TrustError
from fedseg.plan import StudyPlan
from fedseg.result import SiteAnswer, SiteFailure
from fedseg.updates import (
    AnswerError,
    AnswerHeader,
    Enlisted,
    StageName,
    Trained,
    open_answer,
    task_digest,
)

logger = logging.getLogger(__name__)

SHORTEST_POLL_S = 0.002
LONGEST_POLL_S = 0.25
_FLOWER_CODES = {3: "expired", 4: "expired", 5: "unavailable", 8: "crashed"}


class Store(Protocol):
    """Where states are kept; `save` returns only once the state would survive a power cut."""

    def save(self, state: StudyState) -> None:
        """Keep a state in place of the one before."""


@dataclass(frozen=True)
class Clock:
    """Time as the round loop sees it; tests bring their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Study:
    """One running study: a plan, the nodes that serve it, and where its states are kept."""

    def __init__(
        self,
        grid: Grid,
        plan: StudyPlan,
        store: Store,
        *,
        nodes: int,
        observe: Observer = nobody,
        clock: Clock | None = None,
    ) -> None:
        """Bring a study's parts together.

        Args:
            nodes: how many nodes to wait for before the sites enlist.
        """
        self._grid, self._plan, self._store = grid, plan, store
        self._expected, self._needed = nodes, plan.aggregation.minimum_sites
        self._observe = observe
        self._clock = clock or Clock()
        self._roster = Roster()

    def run(self, state: StudyState) -> StudyState:
        """Go on from a state to the end of the study.

        Raises:
            RoundError: a stage failed as often as the plan allows; the last stored state stays.
        """
        self._wait_for_nodes()
        if state.position is not None and state.position.stage != "enlist":
            self._ask(partial(enlist_task, self._plan), "enlist", 0)
        while state.position is not None:
            require_attempts_left(state, self._plan)
            state = self._run_stage(state)
        return state

    def _run_stage(self, state: StudyState) -> StudyState:
        """Open, ask, close and store one stage."""
        assert state.position is not None
        started = self._clock.now()
        position = state.position
        task = partial(open_stage, state, self._plan)
        outcome = self._ask(task, position.stage, position.round, position.attempt)
        state = close_stage(state, self._plan, outcome)
        self._store.save(state)
        self._observe(StageClosed(state.history[-1], self._clock.now() - started))
        return state

    def _ask(
        self, task: Callable[[], bytes], stage: StageName, round_: int, attempt: int = 1
    ) -> Outcome:
        """Send one task to every node and fold what comes back."""
        ttl = self._plan.aggregation.round_timeout_s
        nodes = self._nodes_for(stage)
        self._observe(StageOpened(round_, stage, attempt, len(nodes)))
        digest, size, waiting = self._send(task(), nodes, ttl)
        total = MeanAccumulator(self._plan.built.tensors) if stage == "train" else None
        answers: list[SiteAnswer] = []
        failures = [] if stage == "enlist" else self._offline(nodes)
        for failure in failures:
            self._observe(SiteFailed(round_, stage, failure))
        for node, message in self._arrivals(waiting, ttl):
            try:
                answer = self._fold(node, message, stage, digest, total)
            except (AnswerError, RoundError) as error:
                code = error.code if isinstance(error, AnswerError) else "overflow"
                failure = SiteFailure(site=self._name(node), code=code, reason=str(error))
                failures.append(failure)
                logger.warning("round %s %s: %s: %s", round_, stage, failure.site, failure.reason)
                self._observe(SiteFailed(round_, stage, failure))
                continue
            finally:
                del message  # before the next answer is taken: one is held at a time
            answers.append(answer)
            self._observe(SiteAnswered(round_, stage, answer))
        return Outcome(size * len(nodes), tuple(answers), tuple(failures), total)

    def _send(self, task: bytes, nodes: list[int], ttl: float) -> tuple[str, int, dict[str, int]]:
        """Hand a task to Flower and keep nothing of it: digest, size, and message id -> node."""
        digest, content = task_digest(task), wrap(task)
        messages = [
            Message(content, dst_node_id=node, message_type=MESSAGE_TYPE, ttl=ttl, group_id=digest)
            for node in nodes
        ]
        pushed = self._grid.push_messages(messages)
        return digest, len(task), dict(zip(pushed, nodes, strict=True))

    def _arrivals(
        self, waiting: dict[str, int], timeout_s: float
    ) -> Iterator[tuple[int, Message | None]]:
        """Each node with its message as it arrives; with None when the time is up."""
        deadline = self._clock.now() + timeout_s
        pause = SHORTEST_POLL_S
        while waiting and self._clock.now() < deadline:
            arrived = False
            for message_id in list(waiting):
                replies = list(self._grid.pull_messages([message_id]))
                if replies:
                    arrived = True
                    yield waiting.pop(message_id), replies.pop()
            pause = SHORTEST_POLL_S if arrived else min(2 * pause, LONGEST_POLL_S)
            if waiting and not arrived:
                self._clock.sleep(min(pause, max(0.0, deadline - self._clock.now())))
        for node in waiting.values():
            yield node, None

    def _fold(
        self,
        node: int,
        message: Message | None,
        stage: StageName,
        digest: str,
        total: MeanAccumulator | None,
    ) -> SiteAnswer:
        """Check one answer and add its update to the sum."""
        data = _data_of(message)
        site = self._roster.site_of(node)
        header, delta = open_answer(data, self._plan, task=digest, stage=stage, site=site)
        if isinstance(header.body, Enlisted):
            self._roster.add(node, header.site, header.body.patients.get("train", 0))
        if total is not None and isinstance(header.body, Trained):
            self._check_patients(node, header.body.patients)
            total.fold(delta, weight_of(header.body, self._plan))
        return _answer_of(header, len(data))

    def _check_patients(self, node: int, claimed: int) -> None:
        """A site weighs what it enlisted with: nobody takes a round over by claiming more."""
        enlisted = self._roster.patients_of(node)
        if claimed < 1:
            raise AnswerError("data", "the site has no training patients")
        if claimed != enlisted:
            raise AnswerError(
                "data", f"the site enlisted with {enlisted} training patients and claims {claimed}"
            )

    def _nodes_for(self, stage: StageName) -> list[int]:
        """Everybody while sites enlist, afterwards the enlisted ones that are on line."""
        if stage == "enlist":
            return sorted(self._grid.get_node_ids())
        self._wait(lambda: len(self._online()) >= min(self._needed, len(self._roster)))
        return self._online()

    def _online(self) -> list[int]:
        """The enlisted nodes that are on line."""
        return [n for n in sorted(self._grid.get_node_ids()) if self._roster.site_of(n)]

    def _offline(self, nodes: list[int]) -> list[SiteFailure]:
        """A failure for every enlisted site that cannot be asked."""
        away = set(self._roster.sites) - {self._roster.site_of(node) for node in nodes}
        reason = "the site enlisted but is not on line"
        return [SiteFailure(site=site, code="offline", reason=reason) for site in sorted(away)]

    def _wait_for_nodes(self) -> None:
        """Wait until all expected nodes are on line, at most one round's time."""
        self._wait(lambda: len(list(self._grid.get_node_ids())) >= self._expected)

    def _wait(self, enough: Callable[[], bool]) -> None:
        """Wait for nodes, at most one round's time."""
        deadline = self._clock.now() + self._plan.aggregation.round_timeout_s
        while not enough() and self._clock.now() < deadline:
            self._clock.sleep(LONGEST_POLL_S)

    def _name(self, node: int) -> str:
        """The site's name, or its node's while it has not enlisted."""
        return self._roster.site_of(node) or f"node-{node}"


def _data_of(message: Message | None) -> bytes:
    """The opaque bytes of a reply, or the reason why there are none."""
    if message is None:
        raise AnswerError("timeout", "no answer came before the round's time was up")
    if message.has_error():
        code = _FLOWER_CODES.get(message.error.code, "crashed")
        raise AnswerError(code, f"Flower reports code {message.error.code} for this site")
    try:
        return unwrap(message)
    except TrustError as error:
        raise AnswerError("malformed", str(error)) from None


def _answer_of(header: AnswerHeader, size: int) -> SiteAnswer:
    """What the record keeps of an answer."""
    body = header.body
    if isinstance(body, Trained):
        return SiteAnswer(
            site=header.site,
            patients=body.patients,
            steps=body.steps,
            loss=body.loss,
            bytes_up=size,
        )
    if isinstance(body, Enlisted):
        return SiteAnswer(site=header.site, patients=body.patients.get("train", 0), bytes_up=size)
    assert body.kind == "evaluate"
    return SiteAnswer(site=header.site, patients=body.patients, scores=body.scores, bytes_up=size)
