"""Processes that must not outlive the one that answers for them, as Linux lets one arrange it.

A child asks the kernel to be killed with its parent. Grandchildren are another matter: Flower
starts processes in sessions of their own, which notice only after some seconds that their parent
is gone. Every process that is started for a keeper therefore carries a mark in its environment,
which its children inherit: whoever bears the mark of a keeper but belongs to none of the programs
that live is a stray, and is ended, however it came to be one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

MARK = "FEDSEG_KEPT_BY"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PROCESSES = Path("/proc")
_LIBC = ctypes.CDLL(None, use_errno=True)  # before any fork: a forked child must not load libraries


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Args:
        parent: the process that should be the parent; where it is gone already this one ends too.
    """
    if not sys.platform.startswith("linux"):
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they can be reaped."""
    if sys.platform.startswith("linux"):
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def mark_of(keeper: str, life: str) -> str:
    """What the environment of one life of a program says; it names no path."""
    return f"{_short(keeper)}/{life}"


def strays(keeper: str, lives: Collection[str]) -> list[int]:
    """Processes of this user that bear the keeper's mark and belong to none of these lives."""
    kept = {mark_of(keeper, life) for life in lives}
    prefix = _short(keeper) + "/"
    return [
        pid
        for pid, mark in _marked()
        if mark.startswith(prefix) and mark not in kept and pid != os.getpid()
    ]


def end_strays(keeper: str, lives: Collection[str]) -> list[int]:
    """Kill the strays of a keeper, and say who they were. One may just have started: look again."""
    found = strays(keeper, lives)
    for pid in found:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return found


def reap_adopted(known: Collection[int]) -> None:
    """Take away dead children that nobody waits for; `known` are those that somebody does."""
    for pid in _dead_children(os.getpid()):
        if pid not in known:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def descendants(pid: int) -> list[int]:
    """Every process below one, by Linux's own tables; those that ended meanwhile are left out."""
    children: dict[int, list[int]] = {}
    for each in _pids():
        _, parent = state_of(each) or ("", 0)
        children.setdefault(parent, []).append(each)
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has reaped does not."""
    state, _ = state_of(pid) or ("X", 0)
    return state not in {"Z", "X"}


def state_of(pid: int) -> tuple[str, int] | None:
    """A process's state letter and its parent (proc(5)), or None where there is none."""
    try:
        stat = (_PROCESSES / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    state, parent = stat.rpartition(")")[2].split()[:2]  # the name before it may hold anything
    return state, int(parent)


def _marked() -> Iterator[tuple[int, str]]:
    """Every process whose environment may be read and has a mark."""
    wanted = MARK.encode() + b"="
    for pid in _pids():
        try:
            environment = (_PROCESSES / str(pid) / "environ").read_bytes()
        except OSError:
            continue  # gone meanwhile, or another user's
        for entry in environment.split(b"\0"):
            if entry.startswith(wanted):
                yield pid, entry.removeprefix(wanted).decode(errors="replace")


def _dead_children(parent: int) -> Iterator[int]:
    """Zombies whose parent is this process."""
    for pid in _pids():
        state, ppid = state_of(pid) or ("", 0)
        if state == "Z" and ppid == parent:
            yield pid


def _pids() -> list[int]:
    """Every process there is."""
    if not _PROCESSES.is_dir():
        return []
    return [int(entry.name) for entry in _PROCESSES.iterdir() if entry.name.isdigit()]


def _short(keeper: str) -> str:
    """A keeper's name in the environment of its processes."""
    return hashlib.sha256(keeper.encode()).hexdigest()[:16]
