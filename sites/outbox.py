"""What goes out: sealed for whoever asked, stored, and described for the audit.

An answer is kept, sealed, signed and on disk before its first byte leaves; a refusal is not stored.
`sites.egress` looks again at what either says, whenever it goes out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedseg.chain import Fact
from fedseg.container import peek
from fedseg.plan import StudyPlan
from fedseg.security.envelope import EnvelopeHeader, seal_bytes, seal_envelope
from fedseg.security.identity import COORDINATOR, SiteIdentity
from fedseg.security.keys import SealingKey, SigningKey
from fedseg.updates import AnswerHeader, RefusalCode, Refused, TaskHeader, seal_answer
from sites.answers import Answers, Slot, slot_of
from sites.approval import Approval
from sites.chronicle import Chronicle
from sites.departures import facts_of
from sites.egress import Outgoing, outgoing, permitted

Answer = Path | bytes


@dataclass(frozen=True)
class Ready:
    """An answer on its way out.

    Attributes:
        due: when it may leave, on the gate's clock; it may be in the past.
        about: what the audit will say of it.
        header: of the task's envelope.
        said: the task, where it was one.
        approval: under which it was worked for; None for a refusal.
        out: what it says; None for a refusal.
    """

    answer: Answer
    due: float
    about: dict[str, Fact]
    header: EnvelopeHeader
    said: TaskHeader | None = None
    approval: Approval | None = None
    out: AnswerHeader | None = None


class Outbox:
    """One study's answers on their way out."""

    def __init__(
        self,
        own: SiteIdentity,
        plan: StudyPlan,
        signing: SigningKey,
        answers: Answers,
        *,
        address: str,
        chronicle: Chronicle,
        limit: int,
    ) -> None:
        """Make an outbox.

        Args:
            own: this site.
            signing: its key.
            answers: where they are stored.
            address: the coordinator's.
            limit: the largest answer, in bytes.
        """
        self._own, self._plan, self._signing, self._answers = own, plan, signing, answers
        self._address, self._chronicle, self._limit = address, chronicle, limit

    def ready(
        self,
        header: EnvelopeHeader,
        said: TaskHeader,
        plain: bytes,
        out: Outgoing,
        approval: Approval,
        due: float,
        *,
        repeated: bool = False,
    ) -> Ready:
        """A stored answer, sealed for whoever asked, and what the audit will say of it."""
        about = facts_of(out, said, self._plan) | self._to(header)
        slot, name = slot_of(said), name_of(said, header, approval)
        assert header.reply_to is not None
        sealed = self._answers.sealed(slot, name, header.reply_to)
        if sealed is None:
            facts = {key: about[key] for key in ("round", "stage", "attempt")}
            sealed = self._seal(slot, name, header, plain, facts)
        with sealed.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            about |= {"bytes": file.tell(), "digest": digest, "repeated": repeated}
        return Ready(sealed, due, about, header, said, approval, out.header)

    def refusal(
        self, header: EnvelopeHeader, code: RefusalCode, said: TaskHeader | None, due: float
    ) -> Ready:
        """A sealed answer that has the code alone."""
        body = permitted(Refused(code=code), self._plan)
        answer = AnswerHeader(task=header.about, site=self._own.name, body=body)
        plain = seal_answer(answer, plan=self._plan)
        about = facts_of(outgoing(plain, self._plan), said, self._plan)
        sealed = seal_bytes(plain, **self._sealing(header))
        digest = hashlib.sha256(sealed).hexdigest()
        about |= self._to(header) | {"bytes": len(sealed), "digest": digest, "repeated": False}
        return Ready(sealed, due, about, header, said)

    def _seal(
        self, slot: Slot, name: str, header: EnvelopeHeader, plain: bytes, facts: dict[str, Any]
    ) -> Path:
        """Seal and store an answer, and audit it: only then may it leave."""
        assert header.reply_to is not None
        with self._answers.sealing(slot, name, header.reply_to) as file:
            seal_envelope(file, [plain], size=len(plain), **self._sealing(header))
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # as the coordinator notes it
            left = facts | {"bytes": file.tell(), "digest": digest}
            self._chronicle.write("answered", study=self._plan.study, **left)
        body = peek(plain, AnswerHeader, max_bytes=self._limit).body
        if body.kind == "release":
            self._chronicle.write(
                "released", study=self._plan.study, round=slot.round, digest=body.model
            )
        stored = self._answers.sealed(slot, name, header.reply_to)
        assert stored is not None
        return stored

    def _to(self, header: EnvelopeHeader) -> dict[str, Fact]:
        """To whom an answer goes: the coordinator's address, and the key that can open it."""
        assert header.reply_to is not None
        key = hashlib.sha256(header.reply_to.encode()).hexdigest()
        return {"to": self._address, "key": key, "task": header.about}

    def _sealing(self, header: EnvelopeHeader) -> dict[str, Any]:
        """What every answer to this task is sealed with."""
        assert header.reply_to is not None
        return {
            "kind": "answer",
            "study": self._plan.study,
            "plan": header.plan,
            "roll": header.roll,
            "about": header.about,
            "sender": self._own.name,
            "recipients": {COORDINATOR: SealingKey.from_text(header.reply_to)},
            "signer": self._signing,
        }


def name_of(said: TaskHeader, header: EnvelopeHeader, approval: Approval) -> str:
    """What a task's answer is stored under; one from data that are no longer approved is none.

    Enlisting is asked anew after every approval.
    """
    brings = approval.signature if said.stage == "enlist" else approval.cohort
    return hashlib.sha256(f"{header.about} {brings}".encode()).hexdigest()


def attempt_of(said: TaskHeader, approval: Approval) -> str:
    """What a task asks for, whichever heads of ledgers it acknowledges."""
    asked = f"{said.attempt} {said.model} {approval.cohort}"
    return hashlib.sha256(asked.encode()).hexdigest()
