"""Only one at a time: a file that one process holds locked, with its process id inside.

The kernel lets go of the lock when the process ends, however it ends; the file itself stays and
means nothing.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedseg.errors import FedsegError

_TURN_S = 0.02


class BusyError(FedsegError):
    """Another process holds what only one may hold."""


@contextmanager
def sole(path: Path, what: str, *, patience_s: float = 0.5) -> Iterator[None]:
    """Hold a file's lock; the process id is written inside.

    Args:
        what: what runs already where another holds it, for the message.
        patience_s: how long to wait for it; who only looks holds it for a moment too.

    Raises:
        BusyError: another process holds it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + patience_s
        while not _take(descriptor):
            if time.monotonic() > deadline:
                raise BusyError(f"{what} already, in process {_pid(descriptor) or 'unknown'}")
            time.sleep(_TURN_S)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(path: Path) -> int | None:
    """Who holds a file's lock: its process, 0 if it has not said its name yet, None for nobody."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        shared = fcntl.LOCK_SH  # two who look at once must not take each other for the holder
        return None if _take(descriptor, shared) else _pid(descriptor)
    finally:
        os.close(descriptor)


def _take(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take the lock if it is free; closing the file lets it go."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid(descriptor: int) -> int:
    """The process id inside."""
    text = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
    return int(text) if text.isdigit() else 0
