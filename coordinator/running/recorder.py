"""What is recorded of a run while it runs: checkpoint, progress, audit, and a line of the log.

The round loop gives it every state and tells it of every event. A state is on disk before anything
is told of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from coordinator.folder import StudyFolder
from coordinator.progress.keeper import ProgressKeeper
from coordinator.rounds.events import Event, SiteAnswered, SiteFailed, StageClosed, StageOpened
from coordinator.running.superlink import SuperLink, SuperLinkError
from fedseg.aggregation.checkpoint import save_state
from fedseg.aggregation.rounds import StudyState
from fedseg.chain import Chain, Fact
from fedseg.logs import FIELDS
from fedseg.plan import StudyPlan
from fedseg.result import StageRecord, stage_words

logger = logging.getLogger(__name__)

MAX_REASON = 400
PRESENCE_S = 10.0


class Recorder:
    """Store and observer of one run."""

    def __init__(
        self,
        folder: StudyFolder,
        plan: StudyPlan,
        state: StudyState,
        chain: Chain,
        *,
        sites: tuple[str, ...],
    ) -> None:
        self._folder, self._plan, self._chain = folder, plan, chain
        self._lock = threading.Lock()
        self._keeper = ProgressKeeper(folder.progress, plan, state, sites=sites)

    def save(self, state: StudyState) -> None:
        """Keep a state: on disk first, then it is told."""
        save_state(self._folder.checkpoint, self._plan, state)
        with self._lock:
            self._keeper.stored(state)

    def __call__(self, event: Event) -> None:
        """Record an event and show it."""
        self._record(event)
        with self._lock:
            self._keeper(event)

    def failed(self, reason: str) -> None:
        """The run ends without the study being finished."""
        with self._lock:
            self._keeper.say("failed", reason)

    @contextmanager
    def presence(self, superlink: SuperLink) -> Iterator[None]:
        """Meanwhile note every few seconds which sites are enrolled and on line."""
        over = threading.Event()
        thread = threading.Thread(target=self._look, args=(superlink, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=PRESENCE_S)

    def _look(self, superlink: SuperLink, over: threading.Event) -> None:
        """Ask the SuperLink, whose nodes are those of the roll, until the run is over."""
        while True:
            try:
                nodes = superlink.nodes()
                with self._lock:
                    self._keeper.seen(
                        enrolled=[node.name for node in nodes],
                        online=[node.name for node in nodes if node.online],
                    )
            except SuperLinkError as error:
                logger.warning("nobody knows who is on line: %s", error)
            if over.wait(PRESENCE_S):
                return

    def _record(self, event: Event) -> None:
        """What an event leaves in audit and log."""
        match event:
            case StageOpened():
                facts = {"attempt": event.attempt, "nodes": event.nodes, "bytes": event.size}
                self._note("task_sent", event, digest=event.digest, **facts)
            case SiteAnswered():
                answer = event.answer
                size, digest = answer.bytes_up, event.digest
                own: dict[str, Fact] = {} if answer.own is None else {"own_model": answer.own}
                self._note(
                    "answer_received", event, site=answer.site, bytes=size, digest=digest, **own
                )
            case SiteFailed():
                site, code = event.failure.site, event.failure.code
                reason = event.failure.reason[:MAX_REASON]
                self._note("answer_refused", event, site=site, code=code, reason=reason)
            case StageClosed():
                record = event.record
                fields = {"round": record.round, "answers": len(record.answers)}
                stage = stage_words(record.stage, record.owner)
                logger.info("%s is closed", stage, extra={FIELDS: fields})
                if record.stage == "release":
                    sites = [answer.site for answer in record.answers]
                    self._note("released", record, sites=sites)

    def _note(
        self, what: str, of: StageOpened | SiteAnswered | SiteFailed | StageRecord, **facts: Fact
    ) -> None:
        """One entry of the audit and one line of the log."""
        known: dict[str, Fact] = {"round": of.round, "stage": of.stage}
        known |= ({} if of.owner is None else {"owner": of.owner}) | facts
        self._chain.append(what, study=self._plan.study, **known)
        logger.info("%s", what.replace("_", " "), extra={FIELDS: known})
