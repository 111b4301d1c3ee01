"""One run while the study is not finished: a run is disposable, the checkpoint is not.

Flower does not resume a run whose SuperLink or ServerApp died, and it notices the latter after a
minute. The lock that the ServerApp holds tells at once: where nobody holds it, nobody works on the
study, and a new run is submitted, which goes on from the checkpoint. Runs that end one after the
other without having moved the study are submitted less and less often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.folder import StudyFolder
from coordinator.running.superlink import SuperLink
from fedseg.offspring import is_alive
from fedseg.sole import holder

STARTS_WITHIN_S = 120.0
ENDS_WITHIN_S = 3.0
LONGEST_WAIT_S = 60.0
COMPLETED = "completed"


@dataclass(frozen=True)
class RunState:
    """How the study's run does. `pid`: its ServerApp's process, None while there is none."""

    number: int = 0
    pid: int | None = None
    finished: bool = False
    last_end: str = ""


class Runs:
    """Sees to it that somebody works on the study, and never two."""

    def __init__(
        self, folder: StudyFolder, superlink: SuperLink, tell: Callable[[str], None]
    ) -> None:
        """Begin with no run.

        Args:
            tell: is told in a sentence what happens to runs.
        """
        self._folder, self._superlink, self._tell = folder, superlink, tell
        self._run: int | None = None
        self._since = 0.0
        self._next = 0.0
        self._idle = 0
        self._before = self._mark()
        self.state = RunState()

    def lost(self) -> None:
        """The SuperLink has a new life: no run of the one before goes on."""
        self._run, self._next = None, 0.0
        self._superlink.stop_all()

    def again(self) -> None:
        """There is something new to do, such as a site that was enrolled after the end."""
        self._become(finished=False)
        self._idle, self._next = 0, 0.0

    def turn(self, now: float) -> None:
        """Look after the run; to be called while the SuperLink is ready.

        Raises:
            SuperLinkError: it does not answer.
        """
        pid = holder(self._folder.study_lock)
        if pid is not None:
            self._works(pid, now)
        elif self._run is not None:
            self._perhaps_over(now)
        elif not self.state.finished and now >= self._next:
            self._submit(now)

    def _works(self, pid: int, now: float) -> None:
        """A ServerApp holds the study."""
        if self.state.pid != pid:
            self._tell(f"run {self.state.number} works on the study")
        self._since = now
        self._become(pid=pid)

    def _perhaps_over(self, now: float) -> None:
        """Nobody holds the study: the run has not begun yet, or it has ended."""
        assert self._run is not None
        ended = self._superlink.ended(self._run)
        patience_s = STARTS_WITHIN_S if self.state.pid is None else ENDS_WITHIN_S
        if ended is None and now - self._since < patience_s and not self._was_killed():
            return
        if ended is None:
            self._superlink.stop(self._run)
        self._over(ended or "its process is gone", now)

    def _was_killed(self) -> bool:
        """Whether the process that held the study is gone: Flower notices only after a minute."""
        return self.state.pid is not None and not is_alive(self.state.pid)

    def _over(self, how: str, now: float) -> None:
        """Note a run's end, and when the next is due."""
        finished = how.startswith(COMPLETED)
        moved = self._mark() != self._before
        self._idle = 0 if moved else self._idle + 1
        wait = 0.0 if self._idle < 2 else min(2.0 ** (self._idle - 2), LONGEST_WAIT_S)
        self._run, self._next = None, now + wait
        said = "the study is finished" if finished else f"the next follows in {wait:.0f} s"
        self._tell(f"run {self.state.number} has ended ({_first_line(how)}); {said}")
        self.state = RunState(self.state.number, None, finished, _first_line(how))

    def _submit(self, now: float) -> None:
        """Have a new run go on from the checkpoint."""
        self._before = self._mark()
        self._run, self._since = self._superlink.submit(), now
        self.state = RunState(self.state.number + 1, None, False, self.state.last_end)
        self._tell(f"run {self.state.number} was submitted")

    def _become(self, *, pid: int | None = None, finished: bool = False) -> None:
        """Change the state."""
        self.state = RunState(self.state.number, pid, finished, self.state.last_end)

    def _mark(self) -> float:
        """Something that changes with every closed stage."""
        try:
            return self._folder.checkpoint.stat().st_mtime
        except OSError:
            return 0.0


def _first_line(text: str) -> str:
    """The beginning of what Flower says; a traceback may follow."""
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else "no reason given"
