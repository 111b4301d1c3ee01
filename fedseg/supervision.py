"""Keep programs running: start what is due, see who died, wait a little longer each time, go on.

The one module that starts processes. Everything happens in `step`, which never blocks. Children
are killed by the kernel when the daemon dies, and what a dead program leaves behind (processes of
Flower's in sessions of their own) is ended before the program is started again: two lives of one
program never overlap. Programs get exactly the environment that is given, and one mark.

`step` belongs in the daemon's main thread: the kernel takes the end of the thread that started a
child for the end of the parent.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from fedseg.errors import DataError
from fedseg.offspring import (
    MARK,
    adopt_orphans,
    die_with_parent,
    end_strays,
    mark_of,
    reap_adopted,
)

LONGEST_LOG_BYTES = 32_000_000
STOP_GRACE_S = 10.0
_TURN_S = 0.02
_SWEEPS = 2

Kind = Literal["started", "ready", "ended", "stopped", "strays"]


@dataclass(frozen=True)
class Program:
    """One program that is to run.

    Attributes:
        name: its name in states and happenings.
        command: what is executed; the first word is looked up in the daemon's own PATH.
        environment: all of it; nothing is inherited from the daemon.
        log: where its output is appended, cut when it grows beyond 32 MB (one older file is kept).
        ready: says whether it can be used; asked once a turn until it is true, so it must be quick.
        backoff_s: the wait before the first restart; each further failure doubles it.
        max_backoff_s: the longest wait; a life that lasted longer starts counting anew.
        expected_exits: status -> what to say. Such an end is no failure: the wait stays short.
        folder: the working directory; None leaves it at the daemon's.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    ready: Callable[[], bool] | None = None
    backoff_s: float = 1.0
    max_backoff_s: float = 30.0
    expected_exits: Mapping[int, str] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class State:
    """How a program does. `since`: when its state last changed, on the supervisor's clock."""

    pid: int | None = None
    since: float = 0.0
    restarts: int = 0
    last_exit: int | None = None
    ready: bool = False


@dataclass(frozen=True)
class Happening:
    """Something that happened to a program.

    Attributes:
        status: the exit status of one that ended; negative for the signal that killed it.
        wait_s: seconds until it is started again; None where it will not be.
        expected: the end was one of the program's expected exits, or it was asked to stop.
        detail: a sentence for people.
    """

    program: str
    kind: Kind
    detail: str
    pid: int | None = None
    status: int | None = None
    wait_s: float | None = None
    expected: bool = True


class Supervisor:
    """Keeps programs running until it is told to stop them."""

    def __init__(
        self,
        programs: Iterable[Program],
        *,
        observe: Callable[[Happening], None],
        clock: Callable[[], float] = time.monotonic,
        keeper: str | None = None,
    ) -> None:
        """Take programs into care; nothing is started before the first `step`.

        Args:
            keeper: a name that the next daemon will have too, such as the folder it runs in; then
                what a killed daemon left behind is ended before anything is started. Without it
                only this supervisor's own strays are known.
        """
        self._observe, self._clock = observe, clock
        self._keeper = keeper or secrets.token_hex(16)
        self._lives: dict[str, _Life] = {}
        self._sweeps = _SWEEPS
        self._ended_strays: set[int] = set()
        adopt_orphans()
        for program in programs:
            self._add(program)

    def step(self) -> None:
        """One turn: reap, end what overstays its time or is left behind, start what is due."""
        now = self._clock()
        for life in list(self._lives.values()):
            self._turn(life, now)
        self._end_strays()
        for life in list(self._lives.values()):
            if life.due(now) and not self._sweeps:
                self._start(life, now)

    def start(self, name: str) -> None:
        """Have a stopped program run again, from the next step on."""
        life = self._lives[name]
        if not life.wanted:
            life.wanted, life.next_start, life.failures = True, self._clock(), 0

    def stop(self, name: str, grace_s: float = STOP_GRACE_S) -> None:
        """Ask a program to end; it is killed where it has not within `grace_s`. Does not wait."""
        life = self._lives[name]
        life.wanted = False
        if life.process is not None and life.kill_at is None:
            life.kill_at = self._clock() + grace_s
            life.process.terminate()

    def restart(self, name: str, grace_s: float = STOP_GRACE_S) -> None:
        """End a program and start it again at once."""
        self.stop(name, grace_s)
        self.start(name)

    def replace(self, programs: Iterable[Program]) -> None:
        """Care for these programs alone: new ones start, changed ones restart, others end."""
        wanted = {program.name: program for program in programs}
        for name, life in list(self._lives.items()):
            if name not in wanted:
                life.leaving = True
                self.stop(name)
                if life.process is None:
                    del self._lives[name]
        for program in wanted.values():
            kept = self._lives.get(program.name)
            if kept is None:
                self._add(program)
            elif not _same(kept.program, program) or kept.leaving:
                kept.program, kept.leaving = program, False
                self.restart(program.name)

    def states(self) -> dict[str, State]:
        """How every program does."""
        return {name: life.state for name, life in self._lives.items()}

    def stop_all(self, grace_s: float = STOP_GRACE_S) -> None:
        """End every program, in the reverse of the order they were given in; waits for it."""
        for name in reversed(list(self._lives)):
            self.stop(name, grace_s)
            life = self._lives[name]  # one that was leaving is forgotten when it ends
            while life.process is not None:
                self._turn(life, self._clock())
                time.sleep(_TURN_S)
        self._sweeps = _SWEEPS
        while self._sweeps:
            self._end_strays()
            time.sleep(_TURN_S)

    def _add(self, program: Program) -> None:
        """Take a program into care."""
        self._lives[program.name] = _Life(program, next_start=self._clock())

    def _turn(self, life: _Life, now: float) -> None:
        """See whether a program has ended, is ready or overstays its time."""
        if life.process is None:
            return
        status = life.process.poll()
        if status is not None:
            self._ended(life, status, now)
            return
        if life.kill_at is not None and now >= life.kill_at:
            life.process.kill()
        elif not life.state.ready and (life.program.ready is None or life.program.ready()):
            life.become(now, ready=True)
            self._tell(life, "ready", f"{life.program.name} is ready", pid=life.process.pid)
        keep_short(life.program.log)

    def _start(self, life: _Life, now: float) -> None:
        """Begin a new life; a program that cannot be executed counts as one that ended."""
        program = life.program
        life.mark = f"{program.name}/{secrets.token_hex(8)}"
        try:
            life.process = _spawn(program, mark_of(self._keeper, life.mark))
        except OSError as error:
            life.become(now)
            life.failures += 1
            life.next_start = now + life.wait()
            detail = f"{program.name} cannot be started: {error.strerror}"
            self._tell(life, "ended", detail, wait_s=life.wait(), expected=False)
            return
        restarts = life.state.restarts + (1 if life.lived else 0)
        life.lived = True
        life.become(now, pid=life.process.pid, restarts=restarts)
        self._tell(life, "started", f"{program.name} was started", pid=life.process.pid)

    def _ended(self, life: _Life, status: int, now: float) -> None:
        """Note an end, and when the next life begins."""
        assert life.process is not None
        pid, said = life.process.pid, life.program.expected_exits.get(status)
        asked = life.kill_at is not None
        if now - life.started > life.program.max_backoff_s or asked or said:
            life.failures = 0
        life.failures += 0 if asked or said else 1
        life.process, life.kill_at, life.mark = None, None, None
        life.become(now, last_exit=status)
        self._sweeps = _SWEEPS
        wait = 0.0 if asked else life.wait()
        life.next_start = now + wait
        if asked and not life.wanted:
            self._tell(life, "stopped", f"{life.program.name} has stopped", pid=pid, status=status)
        else:
            detail = f"{life.program.name} {said or 'ended: ' + meaning(status)}"
            good = asked or said is not None
            self._tell(life, "ended", detail, pid=pid, status=status, wait_s=wait, expected=good)
        if life.leaving:
            del self._lives[life.program.name]

    def _end_strays(self) -> None:
        """End what dead programs left behind; nothing is started until two looks found nothing."""
        if not self._sweeps:
            return
        lives = [life.mark for life in self._lives.values() if life.mark]
        found = set(end_strays(self._keeper, lives))
        known = [life.process.pid for life in self._lives.values() if life.process is not None]
        reap_adopted(known)
        self._sweeps = _SWEEPS if found else self._sweeps - 1
        if found - self._ended_strays:
            detail = f"{len(found - self._ended_strays)} processes of an earlier life were ended"
            self._observe(Happening("", "strays", detail))
        self._ended_strays = found

    def _tell(self, life: _Life, kind: Kind, detail: str, **facts: object) -> None:
        """Tell the observer."""
        self._observe(Happening(life.program.name, kind, detail, **facts))  # type: ignore[arg-type]


@dataclass
class _Life:
    """What the supervisor remembers of one program."""

    program: Program
    next_start: float
    process: subprocess.Popen[bytes] | None = None
    mark: str | None = None
    state: State = State()
    started: float = 0.0
    failures: int = 0
    wanted: bool = True
    leaving: bool = False
    lived: bool = False
    kill_at: float | None = None

    def due(self, now: float) -> bool:
        """Whether it is to be started now."""
        return self.process is None and self.wanted and now >= self.next_start

    def wait(self) -> float:
        """Seconds before the next start."""
        doubled = self.program.backoff_s * 2.0 ** min(max(self.failures - 1, 0), 30)
        return min(doubled, self.program.max_backoff_s)

    def become(
        self,
        now: float,
        *,
        pid: int | None = None,
        restarts: int | None = None,
        last_exit: int | None = None,
        ready: bool = False,
    ) -> None:
        """Change the state; what is not given is what it was."""
        if pid is not None:
            self.started = now
        self.state = State(
            pid=self.process.pid if self.process else None,
            since=now,
            restarts=self.state.restarts if restarts is None else restarts,
            last_exit=self.state.last_exit if last_exit is None else last_exit,
            ready=ready,
        )


def keep_short(log: Path) -> None:
    """Cut a log beyond 32 MB, keeping one older file; writers that append go on at the new end.

    It is cut where there is no room for the older file too.
    """
    with suppress(OSError):
        if log.stat().st_size > LONGEST_LOG_BYTES:
            try:
                shutil.copyfile(log, log.with_name(log.name + ".1"))
            finally:
                os.truncate(log, 0)


def meaning(status: int) -> str:
    """An exit status in words."""
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def complete(
    command: tuple[str, ...], environment: Mapping[str, str], *, timeout_s: float
) -> tuple[int, str]:
    """Run a short command to its end: status, and what it said on both streams.

    Raises:
        DataError: it cannot be executed, or did not end in time.
    """
    try:
        done = subprocess.run(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{Path(command[0]).name} did not end within {timeout_s:.0f} s") from None
    except OSError as error:
        raise DataError(f"{Path(command[0]).name} cannot be run: {error.strerror}") from None
    return done.returncode, done.stdout.decode(errors="replace")


def _spawn(program: Program, mark: str) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, so that a terminal's Ctrl-C reaches us alone."""
    program.log.parent.mkdir(parents=True, exist_ok=True)
    with program.log.open("ab") as log:
        return subprocess.Popen(
            program.command,
            env={**program.environment, MARK: mark},
            cwd=program.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 (no lock is taken)
        )


def _same(one: Program, other: Program) -> bool:
    """Whether a program need not be restarted to become the other; probes are not compared."""
    return (one.command, dict(one.environment), one.log, one.folder) == (
        other.command,
        dict(other.environment),
        other.log,
        other.folder,
    )
