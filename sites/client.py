"""How a relay speaks to the trainer: opaque bytes over a local socket, with Python's library alone.

A trainer that is not there, restarts or is paused is waited for, and the task is sent again: the
trainer answers a repeated task with its stored answer. What it refuses is not sent again, nor what
it works on already for a relay that may be gone. Every
message of Flower starts a process that imports this, so it imports next to nothing. A trainer that
ends again and again over one task is not given it for ever: the next task deserves its turn.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedseg.errors import RoundError, TrustError
from sites.socketpath import socket_address

PATIENCE_S = 900.0
ANSWER_S = 24 * 3600.0
CONNECT_S = 10.0
MOST_LOST = 5
PIECE = 1024 * 1024
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.2, 5.0
_GONE = (OSError, http.client.HTTPException)


@dataclass(frozen=True)
class Door:
    """Where a trainer listens.

    Attributes:
        address: `unix:PATH` or `HOST:PORT` on loopback.
        token_file: where the bearer token of a loopback port lies; read anew for every request.
    """

    address: str
    token_file: Path | None = None

    def connection(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection that is opened by its first request."""
        kind, _, where = self.address.partition(":")
        if kind == "unix":
            return _UnixConnection(where, timeout_s)
        host, _, port = self.address.rpartition(":")
        return http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)

    def headers(self) -> dict[str, str]:
        """What a request says besides its body."""
        if self.token_file is None:
            return {}
        return {"Authorization": f"Bearer {self.token_file.read_text('ascii').strip()}"}


@dataclass(frozen=True)
class Clock:
    """Time as the client sees it; tests bring their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def ask(
    door: Door,
    study: str,
    task: bytes,
    *,
    patience_s: float = PATIENCE_S,
    answer_s: float = ANSWER_S,
    clock: Clock | None = None,
) -> bytes:
    """Have the trainer answer a sealed task.

    Args:
        patience_s: how long a trainer that cannot be reached, or is paused, is waited for.
        answer_s: how long one that works on the task may take.

    Raises:
        BusyError: it works on this very task already, for an earlier message.
        RoundError: the trainer could not be reached in time, or ended too often.
        TrustError: it refuses the task.
    """
    clock = clock or Clock()
    until, wait, lost = clock.now() + patience_s, _SHORTEST_WAIT_S, 0
    while True:
        asked = clock.now()
        try:
            return _post(door, f"/studies/{study}/tasks", task, answer_s)
        except (_NotReadyError, *_GONE) as error:
            if clock.now() - asked > _LONGEST_WAIT_S:  # it was there, and worked: wait anew
                until, wait = max(until, clock.now() + patience_s), _SHORTEST_WAIT_S
                lost += 1
            if lost > MOST_LOST:
                raise RoundError(
                    f"the trainer ended {lost} times over one task: its log says why, and the "
                    "machine's whether memory ran out"
                ) from None
            if clock.now() + wait > until:
                raise RoundError(
                    f"the trainer cannot be reached ({_word(error)}): start it, or resume it"
                ) from None
        clock.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT_S)


def status(door: Door, *, timeout_s: float = 5.0) -> dict[str, Any]:
    """What the trainer says that it is doing.

    Raises:
        RoundError: it cannot be reached.
    """
    connection = door.connection(timeout_s)
    try:
        connection.request("GET", "/status", headers=door.headers())
        response = connection.getresponse()
        found = json.loads(response.read(PIECE))
        if response.status != http.client.OK or not isinstance(found, dict):
            raise RoundError(f"the trainer answers with status {response.status}")
        return found
    except (*_GONE, ValueError) as error:
        raise RoundError(f"the trainer cannot be reached: {_word(error)}") from None
    finally:
        connection.close()


class BusyError(RoundError):
    """The trainer works on this task already; its answer will be stored."""


class _NotReadyError(Exception):
    """The trainer is there and asks to be asked later."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_S)
        with socket_address(Path(self._path)) as address:
            self.sock.connect(address)
        self.sock.settimeout(self.timeout)


def _post(door: Door, path: str, task: bytes, answer_s: float) -> bytes:
    """Send a task once and take its answer."""
    connection = door.connection(answer_s)
    try:
        connection.connect()
        # It may refuse before it has read everything: then see what it says.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", path, body=task, headers=door.headers())
        response = connection.getresponse()
        if response.status in {http.client.SERVICE_UNAVAILABLE, http.client.TOO_MANY_REQUESTS}:
            raise _NotReadyError(f"status {response.status}")
        if response.status == http.client.CONFLICT:
            raise BusyError("the trainer works on this task already")
        if response.status != http.client.OK:
            raise TrustError(f"the trainer refuses the task with status {response.status}")
        return _whole(response)
    finally:
        connection.close()


def _whole(response: http.client.HTTPResponse) -> bytes:
    """The answer, piece by piece into one place; one that was cut short is none."""
    size = int(response.headers["Content-Length"])
    answer = bytearray(size)
    place = memoryview(answer)
    filled = 0
    while filled < size:
        count = response.readinto(place[filled : filled + PIECE])
        if not count:
            raise http.client.IncompleteRead(b"")
        filled += count
    return bytes(answer)


def _word(error: BaseException) -> str:
    """Why, without a path."""
    said = error.strerror if isinstance(error, OSError) else str(error)
    return said or type(error).__name__
