"""What an operator sees of a running study, and the few things that can be asked of it.

Looking reads files: the daemon's report, the study's progress, the dates in certificates. Asking
sets a flag in run/, which daemon and ServerApp look at; so it works from another user's shell or
another container, and needs no port.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from coordinator.folder import StudyFolder
from coordinator.office.expiry import warnings
from coordinator.progress.document import Progress, load_progress
from fedseg.durable import write_atomically
from fedseg.errors import DataError, RoundError
from fedseg.frozen import Frozen
from fedseg.sole import holder

Log = Literal["superlink", "proxy", "study", "daemon"]
_TURN_S = 0.1
_FOLLOW_S = 0.3


class ProgramReport(Frozen):
    """One supervised program. `pid` None: it is not running now."""

    name: str
    pid: int | None
    ready: bool
    restarts: int


class NodeReport(Frozen):
    """One site's relay, as the SuperLink sees it."""

    site: str
    online: bool
    last_seen: str


class DaemonReport(Frozen):
    """What the daemon knows. `run`: how many it has submitted; `run_pid`: who works now."""

    pid: int
    programs: tuple[ProgramReport, ...] = ()
    run: int = 0
    run_pid: int | None = None
    finished: bool = False
    last_end: str = ""
    nodes: tuple[NodeReport, ...] = ()
    paused: bool = False
    trouble: str = ""


class Snapshot(Frozen):
    """All that `status` shows. `daemon` None: no daemon runs on this folder."""

    study: str
    address: str
    daemon: DaemonReport | None
    paused: bool
    progress: Progress | None
    warnings: tuple[str, ...]

    @property
    def doing(self) -> str:
        """What the study does now, in a word or two."""
        if self.progress is not None and self.progress.finished:
            return "finished"
        if self.daemon is None:
            return "not running"
        if self.paused:
            return "paused" if self._idle else "pausing after this stage"
        if self.daemon.run_pid is None:
            return "starting"
        return self.progress.phase if self.progress else "starting"

    @property
    def _idle(self) -> bool:
        return self.progress is None or self.progress.open is None


def look(folder: StudyFolder, now: datetime) -> Snapshot:
    """How a study does.

    Raises:
        DataError: the folder's files cannot be read.
        TrustError: the registry or the progress document does not hold.
    """
    settings = folder.settings()
    return Snapshot(
        study=settings.study,
        address=settings.address,
        daemon=_report(folder) if holder(folder.daemon_pid) is not None else None,
        paused=folder.paused.exists(),
        progress=load_progress(folder.progress),
        warnings=warnings(folder, now),
    )


def pause(folder: StudyFolder) -> bool:
    """Begin no new stage; the open one is finished. False where it was paused already."""
    if folder.paused.exists():
        return False
    write_atomically(folder.paused, b"")
    return True


def resume(folder: StudyFolder) -> bool:
    """Go on. False where the study was not paused."""
    try:
        folder.paused.unlink()
    except FileNotFoundError:
        return False
    return True


def stop(folder: StudyFolder, *, within_s: float) -> None:
    """End the daemon and all that it started, and wait for it.

    Raises:
        DataError: no daemon runs on this folder.
        RoundError: it has not ended in time.
    """
    if holder(folder.daemon_pid) is None:
        raise DataError(f"no coordinator runs on {folder.path.name}: there is nothing to stop")
    write_atomically(folder.stop, b"")
    deadline = time.monotonic() + within_s
    while holder(folder.daemon_pid) is not None:
        if time.monotonic() > deadline:
            raise RoundError(
                f"the coordinator has not ended within {within_s:.0f} s; it was asked to and goes "
                "on trying: see `fedseg-coordinator logs --of daemon`"
            )
        time.sleep(_TURN_S)


def read_log(path: Path, last: int, *, follow: bool = False) -> Iterator[str]:
    """The last lines of a log, and with `follow` every new one, across a cut log too.

    Raises:
        DataError: there is no such log yet.
    """
    try:
        file = path.open(errors="replace")
    except FileNotFoundError:
        raise DataError(f"there is no {path.name} yet: nothing has been started") from None
    with file:
        yield from deque(file, maxlen=last)
        while follow:
            line = file.readline()
            if line:
                yield line
                continue
            if os.fstat(file.fileno()).st_size < file.tell():
                file.seek(0)
            time.sleep(_FOLLOW_S)


def _report(folder: StudyFolder) -> DaemonReport | None:
    """What the daemon wrote last; nothing before its first turn."""
    try:
        return DaemonReport.model_validate_json(folder.daemon_report.read_bytes())
    except FileNotFoundError:
        return DaemonReport(pid=holder(folder.daemon_pid) or 0)
    except ValidationError:
        raise DataError(
            f"{folder.daemon_report.name} is of another version: restart the daemon"
        ) from None
