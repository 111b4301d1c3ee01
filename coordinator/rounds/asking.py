"""One task to many nodes: sent, waited for, and sent again where it was lost on the way.

Who is asked is waited for until the time is up. With `again`, a node that went off line and came
back, or of which Flower says that the message or its work was lost, is sent the same task again,
and so is a node that comes only now. A node from which nothing is heard is sent it again now and
then too, less and less often: Flower may lose a message without a word when a connection breaks.
A trainer gives a repeated task its stored answer, and says so while it still works on it. Whatever
is sent and comes how often, each node gives at most one answer, the first; one is held at a time.
What Flower itself cannot read is an answer too, a malformed one: a relay may send anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedseg.carriage import BUSY, MESSAGE_TYPE, wrap
from fedseg.updates import AnswerError

SHORTEST_POLL_S = 0.002
LONGEST_POLL_S = 0.25
PRESENCE_S = 2.0
AGAIN_S = 2.0
LONGEST_AGAIN_S = 60.0
SILENT_S, LONGEST_SILENT_S = 45.0, 600.0
LOST = frozenset({3, 4, 5, 8})  # Flower: message unavailable or expired, node away, app killed
# What Flower raises while it puts a reply together from what a node sent.
UNREADABLE = (AttributeError, DecodeError, LookupError, RecursionError, TypeError, ValueError)

Arrival = Message | AnswerError | None  # an answer, why what came is none, or nothing in time


@dataclass(frozen=True)
class Clock:
    """Time as the coordinator sees it; tests bring their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Spacing:
    """Whom to try again, and when: the longer somebody is tried in vain, the less often.

    Who went away is forgotten, and tried at once when it is back.
    """

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._next: dict[int, tuple[float, float]] = {}

    def due(self, nodes: list[int], now: float) -> list[int]:
        """Those of the nodes that are here now whose turn it is."""
        self._next = {node: kept for node, kept in self._next.items() if node in nodes}
        return [node for node in nodes if now >= self._next.get(node, (now, 0.0))[0]]

    def tried(self, nodes: list[int], now: float) -> None:
        """These were tried just now."""
        for node in nodes:
            wait = self._next[node][1] * 1.5 if node in self._next else self._first_s
            wait = min(wait, self._longest_s)
            self._next[node] = (now + wait, wait)


class Asking:
    """One task while it is on its way.

    Args:
        content: gives the bytes to be sent, each time anew; nothing of them is kept.
        group: names the task in Flower's messages.
        timeout_s: how long answers count.
        again: ask again where it may help.
        welcome: whether a node that was not asked yet may still be; only with `again`.
        expects: whether a node that has not answered is still waited for; only with `again`.
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
        expects: Callable[[int], bool] = lambda _node: True,
    ) -> None:
        self._grid, self._clock, self._content, self._group = grid, clock, content, group
        self._again, self._welcome, self._expects = again, welcome, expects
        self._deadline = clock.now() + timeout_s
        self._waiting: dict[str, int] = {}
        self._open: set[int] = set()
        self._away: set[int] = set()
        self._due: dict[int, float] = {}
        self._tries: dict[int, int] = {}
        self._said: dict[int, Message] = {}
        self._silent = Spacing(SILENT_S, LONGEST_SILENT_S)
        self._looked = clock.now()

    @property
    def sent(self) -> int:
        """How often the task went out."""
        return sum(self._tries.values())

    def arrivals(self, nodes: list[int]) -> Iterator[tuple[int, Arrival]]:
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
            if self._again and self._due_for_a_look():
                for node in [node for node in self._open if not self._expects(node)]:
                    self._close(node)
                    yield node, AnswerError("site", "the site was revoked before it answered")
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
        self._silent.tried(nodes, self._clock.now())
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

    def _pull(self, message_id: str) -> tuple[int, Message | AnswerError] | None:
        """A node's answer if it is there; its other messages are not looked at any more."""
        if message_id not in self._waiting:
            return None
        try:
            replies = list(self._grid.pull_messages([message_id]))
        except UNREADABLE as error:
            kind = type(error).__name__
            node = self._waiting[message_id]
            self._close(node)
            return node, AnswerError("malformed", f"Flower cannot read what came: {kind}")
        if not replies:
            return None
        node, message = self._waiting.pop(message_id), replies.pop()
        if self._again and message.has_error() and message.error.reason == BUSY:
            return None  # an earlier message is being worked on
        if self._again and message.has_error() and message.error.code in LOST:
            self._said[node] = message
            wait = min(AGAIN_S * 2 ** (self._tries[node] - 1), LONGEST_AGAIN_S)
            self._due.setdefault(node, self._clock.now() + wait)
            return None
        self._close(node)
        return node, message

    def _close(self, node: int) -> None:
        """The node has had its say: nothing more of it is looked at."""
        self._open.discard(node)
        self._waiting = {key: other for key, other in self._waiting.items() if other != node}

    def _due_for_a_look(self) -> bool:
        """Whether it is time to see who is here."""
        now = self._clock.now()
        if now < self._looked + PRESENCE_S:
            return False
        self._looked = now
        return True

    def _ask_again(self) -> None:
        """Send the task once more to those who lost it and are here."""
        now = self._clock.now()
        here = set(self._grid.get_node_ids())
        back = {node for node in self._away & here if node in self._open}
        self._away = self._open - here
        due = {node for node, at in self._due.items() if at <= now and node in self._open & here}
        new = {node for node in here if node not in self._tries and self._welcome(node)}
        silent = set(self._silent.due(sorted(self._open & here), now)) - self._due.keys()
        for node in back | due:
            self._due.pop(node, None)
        self._send(sorted(back | due | new | silent))
