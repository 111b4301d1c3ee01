"""What a command costs: CPU of its whole process tree, and the memory that the tree holds at once.

Every process that the command starts inherits a tag in its environment, also those that change
their parent (Ray's daemons do). A sampler reads /proc a few times a second: CPU is user plus system
as of each process's last sample, memory is the sum of the processes' PSS, in which a shared page
counts once. The command says when it starts to count by printing a line that begins with MARK.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "@mark "
TAG = "FEDSEG_BENCHMARK_TAG"
SAMPLE_S, MEMORY_EVERY = 0.1, 5
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class FailedCommandError(Exception):
    """The command ended with an error; the message has the end of what it printed."""


@dataclass(frozen=True)
class Cost:
    """What one command cost.

    Attributes:
        cpu_s: of all processes together, from their start.
        cpu_at: CPU that had been spent when the command printed a mark, by mark.
        peak_mb: largest sum of PSS, MB (10**6 bytes).
        processes: how many were seen.
        said: the members of all JSON objects that the command printed, each on a line.
    """

    cpu_s: float
    cpu_at: dict[str, float]
    peak_mb: float
    processes: int
    wall_s: float
    said: dict[str, Any]


def mark(name: str) -> None:
    """Called by the command: what was spent up to now belongs to what came before `name`."""
    print(f"{MARK}{name} {time.process_time():.6f}", flush=True)


def measure(
    command: Sequence[str], *, environment: Mapping[str, str], log: Path, timeout_s: float = 1800
) -> Cost:
    """Run a command to its end.

    Args:
        command: prints JSON objects, each on a line, among whatever else.
        environment: added to this process's own.
        log: gets everything that it prints.

    Raises:
        FailedCommandError: it failed, or took longer than `timeout_s`.
    """
    tag = secrets.token_hex(8)
    started = time.monotonic()
    tree = _Tree(f"{TAG}={tag}".encode())
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, TAG: tag},
        )
        tree.root = process.pid
        marks: dict[str, float] = {}
        while process.poll() is None:
            tree.sample()
            _take_marks(log, marks, tree)
            if time.monotonic() - started > timeout_s:
                process.kill()
            time.sleep(SAMPLE_S)
    lines = log.read_text(errors="replace").splitlines()
    if process.returncode or not lines:
        raise FailedCommandError(f"exit status {process.returncode}: " + " | ".join(lines[-5:]))
    _take_marks(log, marks, tree)
    tree.end_stragglers()
    return Cost(
        cpu_s=marks.pop("end") if "end" in marks else tree.cpu_s(),
        cpu_at=marks,
        peak_mb=tree.peak_bytes / 1e6,
        processes=len(tree.spent),
        wall_s=time.monotonic() - started,
        said=_objects(lines),
    )


class _Tree:
    """The processes that carry a tag, and what each had spent when it was last seen."""

    def __init__(self, tag: bytes) -> None:
        self._tag = tag
        self._known: dict[str, bool] = {}
        self._samples = 0
        self.root = 0
        self.spent: dict[str, float] = {}
        self.peak_bytes = 0

    def sample(self) -> None:
        """Look at every process once; at its memory every few times."""
        self._samples += 1
        weigh = self._samples % MEMORY_EVERY == 0
        held = 0
        for pid in self._pids():
            stat = _read(f"/proc/{pid}/stat")
            if not stat:
                continue
            fields = stat.rpartition(b")")[2].split()
            self.spent[pid] = (int(fields[11]) + int(fields[12])) * TICK_S
            held += _pss_bytes(pid) if weigh else 0
        self.peak_bytes = max(self.peak_bytes, held)

    def cpu_s(self, but: int | None = None) -> float:
        """CPU seconds of all processes that were ever seen."""
        return sum(spent for pid, spent in self.spent.items() if pid != str(but))

    def end_stragglers(self) -> None:
        """End what outlives the command, as Flower's and Ray's helpers may for a moment."""
        for pid in self._pids():
            if int(pid) != os.getpid():
                os.kill(int(pid), 15)

    def _pids(self) -> list[str]:
        """Every living process with the tag."""
        found = []
        for pid in (name for name in os.listdir("/proc") if name.isdigit()):  # noqa: PTH208
            if not self._known.get(pid):
                self._known[pid] = self._tag in _read(f"/proc/{pid}/environ").split(b"\0")
            if self._known[pid] and Path(f"/proc/{pid}").exists():
                found.append(pid)
        return found


def _objects(lines: Sequence[str]) -> dict[str, Any]:
    """The members of all lines that are JSON objects; later ones win."""
    found: dict[str, Any] = {}
    for line in lines:
        if line.startswith("{"):
            with suppress(ValueError):
                found |= json.loads(line)
    return found


def _take_marks(log: Path, marks: dict[str, float], tree: _Tree) -> None:
    """Note what had been spent at each new mark: the marking process's own word, others sampled."""
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith(MARK):
            name, own = line.removeprefix(MARK).split()
            if name not in marks:
                marks[name] = float(own) + tree.cpu_s(but=tree.root)


def _pss_bytes(pid: str) -> int:
    """Proportional set size of a process."""
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: str) -> bytes:
    """A file of /proc; empty where the process has gone."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
