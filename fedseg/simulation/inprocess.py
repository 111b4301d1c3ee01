"""A Flower Grid in one process: the same apps, no sockets, no Ray.

A message is handed to the ClientApp of its node, and the reply waits until it is pulled. Nodes are
served one after the other by one thread, because torch's threads and generator belong to the
process. A node that keeps its thread longer than its share of a round gets a stand-in, so that a
hospital which hangs holds nobody up; the order in which nodes are served never changes a result.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedseg.simulation.rehearsal import RehearsedCrashError

logger = logging.getLogger(__name__)

CRASHED = 2
_RUN_ID = 1


@dataclass
class _Job:
    """One message on its way through a ClientApp."""

    message_id: str
    message: Message
    started: float | None = None

    @property
    def node(self) -> int:
        """The node that it is for."""
        return self.message.metadata.dst_node_id

    @property
    def expired(self) -> bool:
        """True once nobody waits for the reply any more."""
        metadata = self.message.metadata
        return time.time() > metadata.created_at + metadata.ttl


class InProcessGrid(Grid):
    """Serves the nodes of a simulation in this process.

    Args:
        app: the ClientApp that every node runs.
        contexts: node id -> Flower context, which tells the app whose node it is.
        patience_s: how long a node may keep the thread before others are served beside it.
        arrange: puts waiting messages into the order in which they are served; tests shuffle it.
    """

    def __init__(
        self,
        app: ClientApp,
        contexts: Mapping[int, Context],
        *,
        patience_s: float,
        arrange: Callable[[list[int]], list[int]] = sorted,
    ) -> None:
        _give_this_process_an_identity()
        self._app, self._contexts = app, dict(contexts)
        self._patience_s, self._arrange = patience_s, arrange
        self._queue: deque[_Job] = deque()
        self._busy: dict[int, _Job] = {}
        self._replies: dict[str, Message] = {}
        self._pushed = 0
        self._lock = threading.Lock()
        self._workers = 0

    def set_run(self, run: Run) -> None:
        """Flower's bookkeeping; there is one run here."""

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return Run.create_empty(_RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message (Flower deprecates this in favour of `Message(...)`)."""
        return Message(
            content, dst_node_id=dst_node_id, message_type=message_type, ttl=ttl, group_id=group_id
        )

    def get_node_ids(self) -> Iterable[int]:
        """Every node of the simulation."""
        return sorted(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; returns their ids, in the same order."""
        with self._lock:
            jobs = {self._next_id(): message for message in messages}
            nodes = [message.metadata.dst_node_id for message in jobs.values()]
            order = {node: place for place, node in enumerate(self._arrange(nodes))}
            for message_id, message in jobs.items():
                message.metadata.__dict__["_message_id"] = message_id
            waiting = [_Job(message_id, message) for message_id, message in jobs.items()]
            self._queue.extend(sorted(waiting, key=lambda job: order[job.node]))
            self._hire()
        return list(jobs)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there; each can be pulled once."""
        with self._lock:
            self._hire()
            return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, wait, and return the replies that came in time."""
        waiting = list(self.push_messages(messages))
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        replies: list[Message] = []
        while len(replies) < len(waiting) and time.monotonic() < deadline:
            replies += self.pull_messages(waiting)
            time.sleep(0.002)
        return replies

    def _next_id(self) -> str:
        """A message's id, which Flower's SuperLink would give it."""
        self._pushed += 1
        return f"{self._pushed:012d}"

    def _hire(self) -> None:
        """Start a thread where none can serve: the first, or a stand-in for one that hangs."""
        now = time.monotonic()
        stuck = [j for j in self._busy.values() if now - (j.started or now) > self._patience_s]
        if self._queue and self._workers - len(stuck) < 1:
            self._workers += 1
            threading.Thread(target=self._serve, daemon=True, name="fedseg-nodes").start()

    def _serve(self) -> None:
        """Serve queued messages until there are no more."""
        while True:
            with self._lock:
                job = self._next()
                if job is None:
                    self._workers -= 1
                    return
                job.started = time.monotonic()
                self._busy[job.node] = job
            reply = self._answer(job)
            with self._lock:
                del self._busy[job.node]
                if not job.expired:
                    self._replies[job.message_id] = reply

    def _next(self) -> _Job | None:
        """The first queued message whose node is not at work on another."""
        self._queue = deque(job for job in self._queue if not job.expired)
        for job in self._queue:
            if job.node not in self._busy:
                self._queue.remove(job)
                return job
        return None

    def _answer(self, job: _Job) -> Message:
        """Run the app as a SuperNode would: an exception becomes an error reply."""
        try:
            return self._app(job.message, self._contexts[job.node])
        except (Exception, SystemExit) as error:
            reason = type(error).__name__
            if not isinstance(error, RehearsedCrashError):
                logger.error("a site failed outside its trainer", exc_info=error)
            return Message(Error(code=CRASHED, reason=reason), reply_to=job.message)


def _give_this_process_an_identity() -> None:
    """Flower's messages name the task that made them; a simulation has one."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, 1, 1
