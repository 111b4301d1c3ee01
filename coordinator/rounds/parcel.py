"""A stage's task as it travels: on disk before anything is sent, and not held afterwards."""

from __future__ import annotations

from collections.abc import Callable

from coordinator.rounds.exchange import Exchange
from fedseg.aggregation.rounds import Position
from fedseg.container import peek
from fedseg.updates import TaskHeader, task_digest


class Parcel:
    """A stage's task: how it is named, how large it is, and what is sent."""

    def __init__(self, exchange: Exchange, position: Position, task: Callable[[], bytes]) -> None:
        self._exchange, self._position, self._task = exchange, position, task
        whole = task()
        self.digest = task_digest(whole)
        self.header = peek(whole, TaskHeader, max_bytes=len(whole))
        self._data: bytes | None = exchange.seal(position, whole)
        self.size = len(self._data)

    def content(self) -> bytes:
        """What is sent; sealed again, to the same bytes, from the second time on."""
        data, self._data = self._data, None
        return self._exchange.seal(self._position, self._task()) if data is None else data
