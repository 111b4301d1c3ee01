"""The audit as the ledger's witness: who rolls back the ledger alone is found out.

Every row of the ledger is followed by an entry in the audit that names its number and hash. The
row comes first: after a crash the ledger may be ahead of the audit by rows whose work never began,
never behind it. An entry carries what a debit was, so that the spend can be charged again where a
backup has lost it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from fedseg.chain import Chain, Fact, verify_chain
from fedseg.errors import TrustError
from fedseg.privacy.ledger.entries import (
    Answered,
    Closed,
    Linked,
    Recovered,
    Registered,
    Reserved,
    Retried,
    Row,
    Withdrawn,
    read_event,
)
from fedseg.security.keys import SigningKey

Remembered = Recovered | Answered | Linked | Withdrawn | Closed

ROW, RESTORED = "ledger_row", "ledger_restored"


@dataclass(frozen=True)
class Seen:
    """What the witness knows of a row.

    Attributes:
        number: of the row.
        digest: its hash.
        event: what the row said, where a restored ledger must say it again.
        register: the study whose register the row was, with patients that the audit does not name.
        restored: whether a backup was put in place here, so that rows before it may differ.
    """

    number: int
    digest: str
    event: Remembered | None = None
    register: str | None = None
    restored: bool = False


class Witness(Protocol):
    """Remembers the ledger's rows, where whoever changes the ledger cannot."""

    def seen(self) -> list[Seen]:
        """All that was recorded, in order.

        Raises:
            TrustError: the witness itself was changed.
        """

    def record(self, row: Row, *, restored: bool = False) -> None:
        """Remember a row; it lasts once this returns."""


class AuditWitness:
    """A site's audit chain as the witness."""

    def __init__(self, path: Path, signer: SigningKey, now: Callable[[], str]) -> None:
        self._path = path
        self._signer = signer
        self._chain = Chain(path, signer, now)

    def seen(self) -> list[Seen]:
        """What the audit says of the ledger, in order.

        Raises:
            TrustError: the audit was changed.
        """
        if not self._path.exists() and not self._path.with_suffix(".head").exists():
            return []
        entries = verify_chain(self._path, self._signer.public)
        return [
            _seen(entry.facts, entry.event == RESTORED)
            for entry in entries
            if entry.event in (ROW, RESTORED)
        ]

    def record(self, row: Row, *, restored: bool = False) -> None:
        """Append the row's number and hash to the audit, with the debit if it is one."""
        facts: dict[str, Fact] = {"row": row.n, "hash": row.hash, "what": row.event.kind}
        if isinstance(row.event, Reserved | Retried | Recovered):
            done = row.event.mechanism
            facts |= {
                "reservation": row.event.reservation,
                "study": row.event.study,
                "use": row.event.use,
                "noise_multiplier": done.noise_multiplier,
                "rate": done.rate,
                "steps": done.steps,
                "noise": done.noise,
                "everyone": isinstance(row.event, Recovered) and row.event.everyone,
            }
        elif isinstance(row.event, Answered):
            facts |= {"reservation": row.event.reservation, "answer": row.event.answer}
        elif isinstance(row.event, Linked | Withdrawn | Closed):
            facts |= {"event": row.text}
        elif isinstance(row.event, Registered):
            facts |= {"study": row.event.study}
        self._chain.append(RESTORED if restored else ROW, **facts)


def _seen(facts: dict[str, Fact], restored: bool) -> Seen:
    """One entry of the audit."""
    try:
        register = str(facts["study"]) if facts["what"] == "registered" else None
        number, digest = int(str(facts["row"])), str(facts["hash"])
        return Seen(number, digest, _event(facts), register, restored)
    except (KeyError, ValueError, ValidationError):
        raise TrustError("an entry of the audit about the ledger is not one of ours") from None


def _event(facts: dict[str, Fact]) -> Remembered | None:
    """What an entry of the audit remembers of a row."""
    if "event" in facts:
        event = read_event(str(facts["event"]))
        if not isinstance(event, Linked | Withdrawn | Closed):
            raise ValueError("another kind of row")
        return event
    if "reservation" not in facts:
        return None
    if "answer" in facts:
        return Answered.model_validate({k: facts[k] for k in ("reservation", "answer")})
    mechanism = {k: facts[k] for k in ("noise_multiplier", "rate", "steps", "noise")}
    debit = {k: facts[k] for k in ("reservation", "study", "use", "everyone")}
    return Recovered.model_validate({**debit, "mechanism": mechanism})
