"""A Flower Grid in memory with a false clock, and sites that answer by arithmetic: no threads."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from small_parties import Party

from coordinator.rounds.asking import Clock
from fedseg.aggregation.rounds import StudyState
from fedseg.carriage import unwrap, wrap
from fedseg.container import peek
from fedseg.plan import StudyPlan
from fedseg.security.envelope import open_bytes, read_header, seal_bytes
from fedseg.security.identity import COORDINATOR
from fedseg.security.keys import SealingKey, VerifyKey
from fedseg.updates import AnswerHeader

Answer = bytes | Error | RecordDict | None
Site = Callable[[bytes], Answer | tuple[float, Answer]]


class Time:
    """A clock that moves only when somebody sleeps; something may be due at a time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        happening = [act for at, act in self.due if at <= self.now]
        self.due = [(at, act) for at, act in self.due if at > self.now]
        for act in happening:
            act()

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.now, sleep=self.sleep)


class MemoryGrid(Grid):
    """Nodes that answer at once or after some seconds of a false clock; None is no answer.

    A node in `away` is off line: what it has not delivered is reported as Flower does, code 5. One
    in `hidden` is off line too, but was gone too briefly for that: what it owes still comes.
    """

    def __init__(self, sites: Mapping[int, Site], time: Time) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.sites, self.time = dict(sites), time
        self.away: set[int] = set()
        self.hidden: set[int] = set()
        self.replies: dict[str, tuple[float, Message]] = {}
        self.sent: dict[str, Message] = {}
        self.tasks: list[tuple[int, bytes]] = []

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.sites if node not in self.away | self.hidden]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = f"{len(self.tasks)}"
            ids.append(message_id)
            message.metadata.__dict__["_message_id"] = message_id
            node = message.metadata.dst_node_id
            task = unwrap(message)
            self.tasks.append((node, task))
            self.sent[message_id] = message
            came = self.sites[node](task)
            delay, content = came if isinstance(came, tuple) else (0.0, came)
            if content is not None:
                content = wrap(content) if isinstance(content, bytes) else content
                self.reply(message_id, content, delay)
        return ids

    def reply(self, message_id: str, content: Any, delay: float = 0.0) -> None:
        """Have a message answered some time from now."""
        reply = Message(content, reply_to=self.sent[message_id])
        self.replies[message_id] = (self.time.now + delay, reply)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = []
        for i in message_ids:
            if i in self.replies and self.replies[i][0] <= self.time.now:
                found.append(self.replies.pop(i)[1])
            elif i in self.sent and self.sent[i].metadata.dst_node_id in self.away:
                self.replies.pop(i, None)
                away = Error(code=5, reason="Node unavailable")
                found.append(Message(away, reply_to=self.sent.pop(i)))
        return found

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *_args: Any, **_options: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_args: Any, **_options: Any) -> Iterable[Message]:
        raise NotImplementedError


class Kept:
    """A store in memory: every state that was saved."""

    def __init__(self) -> None:
        self.states: list[StudyState] = []

    def save(self, state: StudyState) -> None:
        self.states.append(state)


@dataclass
class SealedSite:
    """A hospital's gate in small: opens, answers once a task, seals for whoever asked.

    Attributes:
        reply: plain task -> plain answer, the trainer.
        worked: digests of the tasks on which it worked.
    """

    party: Party
    plan: StudyPlan
    study_key: VerifyKey
    reply: Callable[[bytes], bytes]
    worked: list[str] = field(default_factory=list)
    reply_to: list[str | None] = field(default_factory=list)
    plain: dict[str, bytes] = field(default_factory=dict)

    def __call__(self, envelope: bytes) -> bytes:
        header, task = open_bytes(
            envelope,
            kind="task",
            study=self.plan.study,
            signer=self.study_key,
            recipient=self.party.name,
            key=self.party.receiving,
            max_bytes=10**8,
        )
        self.reply_to.append(header.reply_to)
        plain = self.plain.get(header.about)
        if plain is None:
            self.worked.append(header.about)
            plain = self.reply(task)
            if peek(plain, AnswerHeader, max_bytes=10**8).body.kind != "refused":
                self.plain[header.about] = plain
        return seal_answer_of(envelope, plain, self.party)


def seal_answer_of(envelope: bytes, plain: bytes, party: Party, **changes: Any) -> bytes:
    """An answer to a sealed task, by this party; some fields changed."""
    header = read_header(io.BytesIO(envelope), max_bytes=10**8)
    assert header.reply_to is not None
    fields = {
        "kind": "answer",
        "study": header.study,
        "plan": header.plan,
        "roll": header.roll,
        "about": header.about,
        "sender": party.name,
        "recipients": {COORDINATOR: SealingKey.from_text(header.reply_to)},
        "signer": party.signing,
    }
    return seal_bytes(plain, **{**fields, **changes})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
