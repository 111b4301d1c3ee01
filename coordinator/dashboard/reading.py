"""The study folder as its page sees it: files are read, and none is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from coordinator.dashboard.notices import Situation
from coordinator.folder import StudyFolder
from coordinator.office.expiry import warnings
from coordinator.progress.document import Progress, load_progress
from fedseg.errors import FedsegError, TrustError
from fedseg.sole import holder

QUIET_S = 60.0
ENDING_EVERY_S = 600.0


@dataclass(frozen=True)
class _Seen:
    """The document as it was last read."""

    stamp: tuple[int, ...] = ()
    progress: Progress | None = None
    damaged: str = ""


class Reader:
    """The study folder as the page sees it."""

    def __init__(
        self, folder: StudyFolder, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._folder, self._now = folder, now
        self._seen = _Seen()
        self._ending: tuple[datetime, tuple[str, ...]] | None = None

    def read(self) -> tuple[Progress | None, Situation]:
        """The document, and what it cannot say of itself."""
        path = self._folder.progress
        stamp = _stamp(path)
        if stamp != self._seen.stamp or not stamp:
            try:
                self._seen = _Seen(stamp, load_progress(path))
            except TrustError as error:
                self._seen = _Seen(stamp, None, str(error))
        progress = self._seen.progress
        return progress, Situation(
            working=progress is None or self._working(progress),
            daemon=holder(self._folder.daemon_pid) is not None,
            paused=self._folder.paused.exists(),
            damaged=self._seen.damaged,
            open_s=self._age(progress.open.since) if progress and progress.open else 0.0,
            ending=self._ends(),
        )

    def _ends(self) -> tuple[str, ...]:
        """What ends soon; looked up now and then, since it changes by the day."""
        now = self._now()
        if self._ending is None or (now - self._ending[0]).total_seconds() > ENDING_EVERY_S:
            try:
                found = warnings(self._folder, now)
            except FedsegError as error:
                found = (str(error),)
            self._ending = now, found
        return self._ending[1]

    def _working(self, progress: Progress) -> bool:
        """Was there news lately, or does a run still hold the study?"""
        quiet = self._age(progress.updated) > QUIET_S
        return not quiet or holder(self._folder.study_lock) is not None

    def _age(self, iso: str) -> float:
        """Seconds since a time of the document."""
        return (self._now() - datetime.fromisoformat(iso)).total_seconds()


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when the file does; empty where there is none."""
    with suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino
    return ()
