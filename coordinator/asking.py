"""One task to many nodes: sent, waited for, and sent again where it was lost on the way.

Who is asked is waited for until the time is up. With `again`, a node that went off line and came
back, or of which Flower says that the message or its work was lost, is sent the same task again,
and so is a node that comes only now; a trainer gives a repeated task its stored answer. Whatever
is sent and comes how often, each node gives at most one answer, the first; one is held at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedseg.carriage import MESSAGE_TYPE, wrap

SHORTEST_POLL_S = 0.002
LONGEST_POLL_S = 0.25
PRESENCE_S = 2.0
AGAIN_S = 2.0
LONGEST_AGAIN_S = 60.0
LOST = frozenset({3, 4, 5, 8})  # Flower: message unavailable or expired, node away, app killed


@dataclass(frozen=True)
class Clock:
    """Time as the coordinator sees it; tests bring their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Asking:
    """One task while it is on its way.

    Args:
        content: gives the bytes to be sent, each time anew; nothing of them is kept.
        group: names the task in Flower's messages.
        timeout_s: how long answers count.
        again: ask again where it may help.
        welcome: whether a node that was not asked yet may still be; only with `again`.
    """

    def __init__(
        self,
        grid: Grid,
        clock: Clock,
        content: Callable[[], bytes],
        *,
        group: str,
        timeout_s: float,
        again: bool = False,
        welcome: Callable[[int], bool] = lambda _node: False,
    ) -> None:
        self._grid, self._clock, self._content, self._group = grid, clock, content, group
        self._again, self._welcome = again, welcome
        self._deadline = clock.now() + timeout_s
        self._waiting: dict[str, int] = {}
        self._open: set[int] = set()
        self._away: set[int] = set()
        self._due: dict[int, float] = {}
        self._tries: dict[int, int] = {}
        self._said: dict[int, Message] = {}
        self._looked = clock.now()

    @property
    def sent(self) -> int:
        """How often the task went out."""
        return sum(self._tries.values())

    def arrivals(self, nodes: list[int]) -> Iterator[tuple[int, Message | None]]:
        """Ask, and give each node with its answer as it arrives.

        Yields:
            When the time is up, those who gave none: with what Flower last said of them, or None.
        """
        self._send(nodes)
        pause = SHORTEST_POLL_S
        while self._open and self._clock.now() < self._deadline:
            arrived = False
            for message_id in list(self._waiting):
                answer = self._pull(message_id)
                if answer is not None:
                    arrived = True
                    yield answer
                    del answer  # before the next is taken
            if self._again:
                self._ask_again()
            pause = SHORTEST_POLL_S if arrived else min(2 * pause, LONGEST_POLL_S)
            if self._open and not arrived:
                self._clock.sleep(max(0.0, min(pause, self._deadline - self._clock.now())))
        for node in sorted(self._open):
            yield node, self._said.get(node)

    def _send(self, nodes: list[int]) -> None:
        """Send the task; what remains of the time is how long it lives."""
        left = self._deadline - self._clock.now()
        if not nodes or left <= 0:
            return
        for node in nodes:
            self._tries[node] = self._tries.get(node, 0) + 1
        content = wrap(self._content())
        messages = [
            Message(
                content,
                dst_node_id=node,
                message_type=MESSAGE_TYPE,
                ttl=left,
                group_id=self._group,
            )
            for node in nodes
        ]
        pushed = self._grid.push_messages(messages)
        self._waiting |= dict(zip(pushed, nodes, strict=True))
        self._open.update(nodes)

    def _pull(self, message_id: str) -> tuple[int, Message] | None:
        """A node's answer if it is there; its other messages are not looked at any more."""
        if message_id not in self._waiting:
            return None
        replies = list(self._grid.pull_messages([message_id]))
        if not replies:
            return None
        node, message = self._waiting.pop(message_id), replies.pop()
        if self._again and message.has_error() and message.error.code in LOST:
            self._said[node] = message
            wait = min(AGAIN_S * 2 ** (self._tries[node] - 1), LONGEST_AGAIN_S)
            self._due.setdefault(node, self._clock.now() + wait)
            return None
        self._open.discard(node)
        self._waiting = {key: other for key, other in self._waiting.items() if other != node}
        return node, message

    def _ask_again(self) -> None:
        """Send the task once more to those who lost it and are here."""
        now = self._clock.now()
        if now < self._looked + PRESENCE_S:
            return
        self._looked = now
        here = set(self._grid.get_node_ids())
        back = {node for node in self._away & here if node in self._open}
        self._away = self._open - here
        due = {node for node, at in self._due.items() if at <= now and node in self._open & here}
        new = {node for node in here if node not in self._tries and self._welcome(node)}
        for node in back | due:
            self._due.pop(node, None)
        self._send(sorted(back | due | new))
