"""The observer that keeps run/progress.json: every event goes in, the document comes out.

What the checkpoint's history says is taken from there, so a restarted ServerApp writes the same
document again; only times, and who was last seen when, come from the document before. A disk that
refuses the file stops no round: the study does not depend on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path

from coordinator.progress.document import Checkpoint, Phase, Progress, load_progress, rounds_closed
from coordinator.progress.tally import (
    NOT_ASKED,
    OpenStage,
    Sighting,
    StageProgress,
    Timing,
    failure_entry,
    seconds_left,
    sites_of,
    stages_of,
)
from coordinator.rounds.events import (
    Event,
    Paused,
    Resumed,
    SiteAnswered,
    SiteFailed,
    StageClosed,
    StageOpened,
)
from fedseg.aggregation.rounds import StudyState, ahead
from fedseg.aggregation.suspicions import suspicions
from fedseg.arrays import digest_of
from fedseg.durable import write_atomically
from fedseg.errors import StorageError, TrustError
from fedseg.plan import StudyPlan
from fedseg.privacy.words import in_one_line, outputs_of
from fedseg.result import SiteAnswer, SiteFailure, StageRecord
from fedseg.security.documents import stamp

logger = logging.getLogger(__name__)

AWAY = frozenset({"offline", "unavailable"})


class ProgressKeeper:
    """Follows one study and keeps its document: an `Observer` that also sees states stored.

    Use one a run: `Study(..., observe=keeper)`, with a store that calls `stored` after a save.
    """

    def __init__(
        self,
        path: Path,
        plan: StudyPlan,
        state: StudyState,
        *,
        sites: Iterable[str] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Begin from a study's state and from the document that an earlier run left.

        Args:
            path: the document; a damaged one is replaced.
            sites: who is enrolled.
        """
        self._path, self._plan, self._now = path, plan, now
        self._sites = tuple(sites)
        self._position, self._history = state.position, state.history
        self._open: OpenStage | None = None
        self._answers: list[SiteAnswer] = []
        self._failures: list[SiteFailure] = []
        self._size = 0
        self._phase: Phase = "finished" if state.position is None else "waiting"
        self._note = ""
        before = _before(path, plan)
        self._started = before.started if before else self._time()
        self._seen = {site.name: site.sighting for site in before.sites} if before else {}
        self._seen = {k: s.model_copy(update={"online": None}) for k, s in self._seen.items()}
        self._timings = _timings(self._history, before.stages if before else ())
        self._checkpoint = before.checkpoint if before else None
        self._write()

    def __call__(self, event: Event) -> None:
        """Take an event in and write the document."""
        match event:
            case StageOpened():
                self._opened(event)
            case SiteAnswered():
                self._answered(event.answer)
            case SiteFailed():
                self._failed(event.failure)
            case StageClosed():
                self._closed(event)
            case Paused():  # sites may have enlisted beside the stages: nothing is open any more
                self._phase, self._note, self._open = "paused", "", None
            case Resumed():
                self._phase, self._note = "running", ""
        self._write()

    def stored(self, state: StudyState) -> None:
        """A state is on disk: the checkpoint from which a restart goes on."""
        self._checkpoint = Checkpoint(
            at=self._time(),
            model=digest_of(state.server.model),
            round=rounds_closed(state.position, self._plan),
        )
        self._position, self._history = state.position, state.history
        if self._position is None:  # a release that is offered again is stored, and not closed
            self._phase, self._open = "finished", None
        self._write()

    def seen(self, enrolled: Collection[str], online: Collection[str]) -> None:
        """These sites are enrolled now, and of them these are on line."""
        self._sites = tuple(sorted(enrolled))
        for name in {*self._names(), *online}:
            here = name in online
            own = self._seen.get(name, Sighting())
            seen = self._time() if here else own.last_seen
            self._seen[name] = own.model_copy(update={"online": here, "last_seen": seen})
        self._write()

    def say(self, phase: Phase, note: str = "") -> None:
        """The study was paused, goes on, or failed; a note says why."""
        self._phase, self._note = phase, note
        self._write()

    def document(self) -> Progress:
        """The document as of now."""
        stages = stages_of(self._history, self._timings)
        history, timings = self._with_the_open_stage()
        to_come = ahead(self._position, self._plan, self._history)
        return Progress(
            study=self._plan.study,
            plan=self._plan.digest,
            rounds=self._plan.aggregation.rounds,
            rounds_closed=rounds_closed(self._position, self._plan),
            minimum_sites=self._plan.aggregation.minimum_sites,
            attempts=self._plan.aggregation.attempts,
            guarantee=in_one_line(self._plan),
            private=self._plan.private is not None,
            withheld=tuple(o.name for o in outputs_of(self._plan) if o.openness == "none"),
            started=self._started,
            updated=self._time(),
            phase=self._phase,
            note=self._note,
            open=self._open,
            sites=sites_of(self._sites, history, timings, self._seen),
            stages=stages,
            checkpoint=self._checkpoint,
            left_s=seconds_left(to_come, stages, self._open_s()),
            suspicions=suspicions(self._history),
        )

    def _opened(self, event: StageOpened) -> None:
        """A task goes out: of the stage that is due, or beside it to those who come late."""
        if self._position is not None:
            self._phase, self._note = "running", ""
        elif event.stage == "enlist":  # after the end, for the release's sake: no stage opens
            return
        self._answers, self._failures = [], []
        self._size = event.size
        self._open = OpenStage(
            round=event.round,
            stage=event.stage,
            attempt=event.attempt,
            owner=event.owner,
            since=self._time(),
            nodes=event.nodes,
            waiting_for=self._asked(event),
        )

    def _asked(self, event: StageOpened) -> tuple[str, ...]:
        """Who is to answer, as far as that is known by name."""
        if self._position is None:  # the release again, to those who lack it
            have = {answer.site for answer in self._history[-1].answers}
            return tuple(name for name in self._sites if name not in have)
        late = event.stage == "enlist" and self._position.stage != "enlist"
        return () if late else self._sites

    def _answered(self, answer: SiteAnswer) -> None:
        """A site answered: it is here."""
        self._answers.append(answer)
        self._failures = [f for f in self._failures if f.site != answer.site]
        seen = Sighting(online=True, last_seen=self._time(), last_answer=self._time())
        self._seen[answer.site] = seen
        self._refresh()

    def _failed(self, failure: SiteFailure) -> None:
        """A site gave no usable answer; one that is away is not on line."""
        self._failures = [f for f in self._failures if f.site != failure.site]
        self._failures.append(failure)
        if failure.code in AWAY:
            own = self._seen.get(failure.site, Sighting())
            self._seen[failure.site] = own.model_copy(update={"online": False})
        self._refresh()

    def _closed(self, event: StageClosed) -> None:
        """A stage is over."""
        if self._history[-1:] != (event.record,):
            self._history = (*self._history, event.record)
        missing = len(self._history) - 1 - len(self._timings)
        self._timings += [Timing()] * missing
        self._timings.append(Timing(closed=self._time(), wall_s=round(event.wall_s, 3)))
        self._open, self._answers, self._failures = None, [], []
        if self._position is None:
            self._phase = "finished"

    def _refresh(self) -> None:
        """The open stage with what came so far."""
        if self._open is None:
            return
        record = self._open_record(self._open)
        answered = tuple(sorted(answer.site for answer in self._answers))
        done = {*answered, *(failure.site for failure in self._failures)}
        waiting = tuple(name for name in self._open.waiting_for if name not in done)
        self._open = self._open.model_copy(
            update={
                "answered": answered,
                "failures": tuple(failure_entry(record, f, self._time()) for f in self._failures),
                "waiting_for": waiting,
            }
        )

    def _with_the_open_stage(self) -> tuple[tuple[StageRecord, ...], list[Timing]]:
        """The history and, as its last record, the open stage as far as it got."""
        if self._open is None:
            return self._history, self._timings
        timings = [*self._timings, *[Timing()] * (len(self._history) - len(self._timings))]
        return (*self._history, self._open_record(self._open)), [
            *timings,
            Timing(closed=self._time()),
        ]

    def _open_record(self, stage: OpenStage) -> StageRecord:
        """The open stage as a record."""
        reached = sum(failure.code not in NOT_ASKED for failure in self._failures)
        return StageRecord(
            round=stage.round,
            stage=stage.stage,
            attempt=stage.attempt,
            owner=stage.owner,
            bytes_down=self._size * (len(self._answers) + reached),
            bytes_up=sum(answer.bytes_up for answer in self._answers),
            answers=tuple(self._answers),
            failures=tuple(self._failures),
        )

    def _names(self) -> tuple[str, ...]:
        """Everybody who is enrolled or has ever answered."""
        answered = {answer.site for record in self._history for answer in record.answers}
        answered |= {answer.site for answer in self._answers}
        return tuple(sorted({*self._sites, *answered}))

    def _open_s(self) -> float:
        """How long the open stage has been open."""
        if self._open is None:
            return 0.0
        return (self._now() - datetime.fromisoformat(self._open.since)).total_seconds()

    def _time(self) -> str:
        """Now, as the document writes it."""
        return stamp(self._now())

    def _write(self) -> None:
        """Replace the file. The study does not depend on it, so a full disk is only logged."""
        data = self.document().model_dump_json().encode()
        try:
            write_atomically(self._path, data, 0o640)
        except StorageError as error:
            logger.warning("the progress document is out of date: %s", error)


def _before(path: Path, plan: StudyPlan) -> Progress | None:
    """What an earlier run of the same plan left, if it can be read."""
    try:
        before = load_progress(path)
    except TrustError as error:
        logger.warning("times before this start are unknown: %s", error)
        return None
    return before if before and before.plan == plan.digest else None


def _timings(history: Sequence[StageRecord], before: Sequence[StageProgress]) -> list[Timing]:
    """The times of the stages that the history and the document before have in common."""
    pairs = zip_longest(history, before[: len(history)], fillvalue=None)
    return [_same(record, stage) for record, stage in pairs if record is not None]


def _same(record: StageRecord, stage: StageProgress | None) -> Timing:
    """The time of a stage if it is the record's."""
    if stage is None:
        return Timing()
    key = (record.round, record.stage, record.attempt)
    return stage.timing if (stage.round, stage.stage, stage.attempt) == key else Timing()
