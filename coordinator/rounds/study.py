"""Running a study: open a stage, send its task, fold the answers as they arrive, close, store.

One answer is held at a time. An answer that does not fit is refused and named, and the stage goes
on; a node that has not answered when the time is up is named too, and its late answer is never
looked at. The state is stored after every stage, before anything else happens; only then are the
stage's keys destroyed. Own models that hospitals let go are on disk until they were measured.
Between stages a study can be paused, and sites may enlist that came later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Protocol

from flwr.serverapp import Grid

from coordinator.rounds.asking import LONGEST_POLL_S, Asking, Clock, Spacing
from coordinator.rounds.events import (
    Observer,
    Paused,
    Resumed,
    SiteFailed,
    StageClosed,
    StageOpened,
    nobody,
)
from coordinator.rounds.exchange import Exchange, Plain
from coordinator.rounds.folding import Folding, Keeping
from coordinator.rounds.parcel import Parcel
from coordinator.rounds.roster import Roster
from fedseg.aggregation.ownmodels import LostModelError, OwnModels
from fedseg.aggregation.robust import Combiner, combiner
from fedseg.aggregation.rounds import (
    ENLIST,
    Outcome,
    Position,
    StudyState,
    ahead,
    also_received,
    close_stage,
    enlist_task,
    open_stage,
    release_position,
    release_task,
    require_attempts_left,
)
from fedseg.aggregation.server import Model
from fedseg.aggregation.spill import sweep
from fedseg.errors import RoundError
from fedseg.plan import StudyPlan
from fedseg.result import SiteFailure, StageRecord
from fedseg.security.consent import Consent
from fedseg.security.identity import SignedRoll
from fedseg.updates import AnswerError, StageName

logger = logging.getLogger(__name__)

ENLIST_S = 120.0
LATE_ENLIST_S = 30.0
AGAIN_S, LONGEST_AGAIN_S = 60.0, 900.0
PAUSE_S = 1.0


class Store(Protocol):
    """Where states are kept; `save` returns only once the state would survive a power cut."""

    def save(self, state: StudyState) -> None:
        """Keep a state in place of the one before."""


class KeptBackError(RoundError):
    """A hospital's own model cannot be measured although it was let go; `failure` says why."""

    def __init__(self, failure: SiteFailure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


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
        exchange: Exchange | None = None,
        reask: bool = False,
        every_label: bool = True,
        paused: Callable[[], bool] = lambda: False,
        scratch: Path | None = None,
        own_models: Path | None = None,
    ) -> None:
        """Bring a study's parts together.

        Args:
            nodes: how many nodes to wait for before the sites enlist.
            exchange: how tasks and answers travel; as they are by default.
            reask: ask nodes again that come back while a stage's time lasts, and let sites enlist
                late: between hospitals, where nodes are far away and tasks have stored answers.
            every_label: as in `close_stage`; False for a hospital that trains alone.
            paused: no stage is opened while it says True; asked before every stage.
            scratch: folder of this study's own for the updates of the open round, which robust
                rules need; what a crash left there is removed.
            own_models: likewise for hospitals' own models, which a plan that measures them needs;
                what a crash left there is gone on with.
        """
        self._grid, self._plan, self._store = grid, plan, store
        self._expected, self._needed = nodes, plan.aggregation.minimum_sites
        self._observe, self._reask, self._paused = observe, reask, paused
        self._every_label = every_label
        self._clock = clock or Clock()
        self._exchange: Exchange = exchange or Plain()
        self._roster = Roster()
        self._scratch = scratch
        self._own: OwnModels | None = None
        if plan.evaluation.own_models:
            if own_models is None:
                raise ValueError("a plan that measures own models needs a folder to keep them in")
            self._own = OwnModels(own_models, plan)
        self._begun = False
        self._history: tuple[StageRecord, ...] = ()
        self._roll: SignedRoll | None = None
        self._courted = self._offered = Spacing(AGAIN_S, LONGEST_AGAIN_S)

    def run(self, state: StudyState) -> StudyState:
        """Go on from a state to the end of the study.

        Raises:
            RoundError: a stage failed as often as the plan allows; the last stored state stays.
        """
        self._destroy_leftovers(state)
        if self._scratch is not None:
            sweep(self._scratch)
        self._begin_anew()
        self._history = state.history
        if state.position is not None:
            self._wait(lambda: len(list(self._grid.get_node_ids())) >= self._expected)
            if state.position.stage != "enlist":
                self._enlist(sorted(self._grid.get_node_ids()), ENLIST_S)
        while state.position is not None:
            require_attempts_left(state, self._plan)
            nodes = self._nodes_for(state.position)
            state = self._run_stage(state, state.position, nodes)
        return state

    def lacking(self, state: StudyState) -> tuple[str, ...]:
        """The sites to which the released model of a finished study has not come.

        Where there is a roll those of it alone: who was revoked is owed nothing.
        """
        if not self._begun:
            self._begin_anew()
        received = {answer.site for answer in state.history[-1].answers}
        known = {answer.site for record in state.history for answer in record.answers}
        return tuple(sorted(set(self._exchange.sites or known) - received))

    def redeliver(self, state: StudyState) -> StudyState:
        """Offer the released model of a finished study once more to on-line sites that lack it.

        To be called now and then, also in a new process; returns once they answered or a round's
        time is up, and at once where none of them is here or was not asked a moment ago.

        Returns:
            The state with what came added to its last record, stored.
        """
        if not self._begun or self._exchange.changed():
            self._begin_anew()
        self._history = state.history
        self._court()
        lacking = self.lacking(state)
        here = [n for n in self._online() if self._roster.site_of(n) in lacking]
        nodes = self._offered.due(here, self._clock.now())
        if not nodes:
            return state
        position = release_position(state)
        outcome = self._ask(position, partial(release_task, state, self._plan), nodes)
        self._offered.tried(nodes, self._clock.now())
        state = also_received(state, outcome)
        self._store.save(state)
        self._exchange.closed(position)
        return state

    def _run_stage(self, state: StudyState, position: Position, nodes: list[int]) -> StudyState:
        """Open, ask, close and store one stage."""
        started = self._clock.now()
        task = partial(open_stage, state, self._plan, self._roll, self._own_model)
        here = {self._roster.site_of(node) for node in nodes}
        known = {*self._exchange.sites, *self._roster.sites}
        absent = known - here if position.stage != "enlist" else set()
        training = position.stage == "train"
        total = combiner(self._plan, self._scratch) if training else None
        keeping = None
        if training and self._own and self._plan.lets_own_models_go(position.round):
            keeping = Keeping(self._own, state.server.model, self._roll)
        try:
            try:
                outcome = self._ask(
                    position, task, nodes, absent=absent, total=total, keeping=keeping
                )
            except KeptBackError as error:
                outcome = self._kept_back(position, error)
            state = close_stage(state, self._plan, outcome, every_label=self._every_label)
        finally:
            if total is not None:
                total.close()
        self._store.save(state)
        self._history = state.history
        if not position.same_stage(state.position):
            self._exchange.closed(position)
        self._forget_own(state)
        self._observe(StageClosed(state.history[-1], self._clock.now() - started))
        return state

    def _own_model(self, site: str, digest: str) -> tuple[Consent, Model]:
        """A hospital's own model and its consent, looked at again each time that it is sent.

        Raises:
            KeptBackError: the disk has lost it, its owner is revoked by now, or somebody has joined
                to whom it was not let go.
        """
        assert self._own is not None  # a plan that measures own models has it
        try:
            kept, model = self._own.load(site, digest)
            self._exchange.require_given(kept.consent)
            if joined := kept.joined_since(self._roll):
                who = ", ".join(joined)
                raise AnswerError("joined", f"{site} let its own model go before {who} joined")
        except (AnswerError, LostModelError) as error:
            code = error.code if isinstance(error, AnswerError) else "lost"
            raise KeptBackError(SiteFailure(site=site, code=code, reason=str(error))) from None
        return kept.consent, model

    def _kept_back(self, position: Position, error: KeptBackError) -> Outcome:
        """What a stage brings whose model is not sent any more: nothing, and the study goes on."""
        why = error.failure
        logger.warning("%s's own model is not measured: %s", why.site, why.reason)
        self._observe(SiteFailed(position.round, position.stage, why, position.owner))
        return Outcome(0, (), (why,))

    def _destroy_leftovers(self, state: StudyState) -> None:
        """Destroy keys of closed stages and own models past use, which a crash may have left."""
        if state.history:
            last = state.history[-1]
            names = ("round", "stage", "attempt", "owner")
            position = Position.model_validate({name: getattr(last, name) for name in names})
            if not position.same_stage(state.position):
                self._exchange.closed(position)
        self._forget_own(state)

    def _forget_own(self, state: StudyState) -> None:
        """Remove the own models that no stage to come measures."""
        if self._own is not None:
            to_come = ahead(state.position, self._plan, state.history)
            self._own.keep_only([stage.owner for stage in to_come if stage.owner is not None])

    def _between_stages(self, position: Position) -> None:
        """Wait while the study is paused; enlist again where others take part now."""
        if self._paused():
            self._observe(Paused())
            while self._paused():
                self._clock.sleep(PAUSE_S)
            self._observe(Resumed())
        if self._exchange.changed():
            self._begin_anew()
            if position.stage != "enlist":
                self._enlist(sorted(self._grid.get_node_ids()), ENLIST_S)

    def _begin_anew(self) -> None:
        """Put the roll as it stands in force; nobody has enlisted under it yet."""
        self._begun, self._roll = True, self._exchange.adopt()
        self._roster = Roster()
        self._courted = Spacing(AGAIN_S, LONGEST_AGAIN_S)
        self._offered = Spacing(AGAIN_S, LONGEST_AGAIN_S)

    def _enlist(self, nodes: list[int], at_most_s: float) -> None:
        """Ask nodes to enlist beside the stages of the study."""
        if nodes:
            task = partial(enlist_task, self._plan, self._roll, self._history)
            self._ask(ENLIST, task, nodes, at_most_s)
            self._exchange.closed(ENLIST)
            self._courted.tried(nodes, self._clock.now())

    def _court(self) -> None:
        """Ask nodes to enlist that have not, and were not asked a moment ago."""
        here = self._courted.due(sorted(self._grid.get_node_ids()), self._clock.now())
        self._enlist([n for n in here if not self._roster.site_of(n)], LATE_ENLIST_S)

    def _ask(
        self,
        position: Position,
        task: Callable[[], bytes],
        nodes: list[int],
        at_most_s: float = float("inf"),
        absent: Collection[str] = (),
        total: Combiner | None = None,
        keeping: Keeping | None = None,
    ) -> Outcome:
        """Send one task to nodes and fold what comes back; who is absent is named."""
        parcel = Parcel(self._exchange, position, task)
        round_, stage, attempt = position.round, position.stage, position.attempt
        size, owner = parcel.size, position.owner
        opened = StageOpened(round_, stage, attempt, len(nodes), parcel.digest, size, owner)
        self._observe(opened)
        folding = Folding(
            self._plan,
            position,
            (parcel.header, parcel.digest),
            roster=self._roster,
            exchange=self._exchange,
            observe=self._observe,
            total=total,
            keeping=keeping,
        )
        folding.absent(absent)
        asking = Asking(
            self._grid,
            self._clock,
            parcel.content,
            group=parcel.digest,
            timeout_s=min(self._plan.aggregation.round_timeout_s, at_most_s),
            again=self._reask,
            welcome=partial(self._welcome, folding, stage),
            expects=self._expects,
        )
        for node, message in asking.arrivals(nodes):
            folding.take(node, message)
            del message  # before the next answer is taken: one is held at a time
        return folding.outcome(parcel.size * asking.sent)

    def _welcome(self, folding: Folding, stage: StageName, node: int) -> bool:
        """Whether a node that comes only now is asked too."""
        site = self._roster.site_of(node)
        if stage == "enlist":
            return site is None
        return site is not None and not folding.answered(site)

    def _expects(self, node: int) -> bool:
        """Whether a node that was asked is still waited for: one of a revoked site is not."""
        site = self._roster.site_of(node)
        return site is None or not self._exchange.revoked(site)

    def _nodes_for(self, position: Position) -> list[int]:
        """Everybody while sites enlist, afterwards the enlisted ones that are on line.

        Waiting for them can take long: a pause, or a changed roll, is heeded before they are asked.
        """
        while True:
            self._between_stages(position)
            if position.stage == "enlist":
                return sorted(self._grid.get_node_ids())
            self._wait(self._enough_are_here)
            if not self._paused() and not self._exchange.changed():
                return self._online()

    def _enough_are_here(self) -> bool:
        """Whether a stage can be opened; between hospitals, late ones may enlist first."""
        if not self._reask:
            return len(self._online()) >= min(self._needed, len(self._roster))
        self._court()
        return len(self._online()) >= self._needed

    def _online(self) -> list[int]:
        """The enlisted nodes that are on line."""
        return [n for n in sorted(self._grid.get_node_ids()) if self._roster.site_of(n)]

    def _wait(self, enough: Callable[[], bool]) -> None:
        """Wait for nodes, at most one round's time."""
        deadline = self._clock.now() + self._plan.aggregation.round_timeout_s
        while not enough() and self._clock.now() < deadline:
            self._clock.sleep(LONGEST_POLL_S)
