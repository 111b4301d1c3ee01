"""What a ledger's row can say, and how rows are chained.

A row states an event, never an epsilon: what was done stays true when accounting improves. Patients
appear as keyed hashes of their ids, so that the file alone names nobody and the same patient is the
same in every cohort and study.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Annotated, Literal

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
)

from fedseg.errors import TrustError
from fedseg.frozen import Digest, Frozen, Name
from fedseg.privacy.mechanisms import Allowed, Mechanism, Use

START = "0" * 64
_LEAST_SECRET = 32
_MOST_LINKED = 100  # so that a link fits into a line of the audit

Patient = Digest
Words = Annotated[str, Field(min_length=1, max_length=500)]


class Opened(Frozen):
    """The first row: which secret hashes the ids, and the filter's Renyi order, fixed for good."""

    kind: Literal["opened"] = "opened"
    secret_check: Digest
    order: Annotated[float, Field(gt=1)]


class Registered(Frozen):
    """A study with its frozen cohort and its fixed schedule, all attempts included.

    `delta` is the plan's. Rows from before it was written have none, and stay what was hashed.
    """

    kind: Literal["registered"] = "registered"
    study: Name
    plan: Digest
    train: tuple[Patient, ...]
    val: tuple[Patient, ...]
    schedule: tuple[Allowed, ...]
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_serializer(mode="wrap")
    def _as_hashed(self, written: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        value: dict[str, JsonValue] = written(self)
        if self.delta is None:
            del value["delta"]
        return value


class Reserved(Frozen):
    """A debit: the patients of one use of one study are charged from here on."""

    kind: Literal["reserved"] = "reserved"
    reservation: Digest
    study: Name
    use: Use
    mechanism: Mechanism


class Retried(Frozen):
    """Work under a reservation began again; it costs nothing while one answer alone is sealed.

    It says again what was reserved, so that the audit knows it even where the first row's entry
    never got there.
    """

    kind: Literal["retried"] = "retried"
    reservation: Digest
    study: Name
    use: Use
    mechanism: Mechanism


class Answered(Frozen):
    """The one answer that a reservation may ever give."""

    kind: Literal["answered"] = "answered"
    reservation: Digest
    answer: Digest


class Closed(Frozen):
    """A study is over, or the site left it: nothing more is reserved for it."""

    kind: Literal["closed"] = "closed"
    study: Name
    reason: Words


class Linked(Frozen):
    """Ids that turned out to mean the same people: each new one carries all of the old ones."""

    kind: Literal["linked"] = "linked"
    old: Annotated[tuple[Patient, ...], Field(min_length=1, max_length=_MOST_LINKED)]
    new: Annotated[tuple[Patient, ...], Field(min_length=1, max_length=_MOST_LINKED)]
    reason: Words


class Withdrawn(Frozen):
    """A patient's data are not used from here on; what was spent stays spent."""

    kind: Literal["withdrawn"] = "withdrawn"
    patient: Patient
    reason: Words


class Recovered(Frozen):
    """A debit that another copy or the audit knows of and a restored ledger had lost.

    Where the register that it was made under is lost as well, `everyone` is charged, known or not.
    """

    kind: Literal["recovered"] = "recovered"
    reservation: Digest
    study: Name
    use: Use
    mechanism: Mechanism
    everyone: bool = False


class Restored(Frozen):
    """A backup was put in place, and this many debits were written anew."""

    kind: Literal["restored"] = "restored"
    recovered: Annotated[int, Field(ge=0)]
    reason: Words


Event = Annotated[
    Opened
    | Registered
    | Reserved
    | Retried
    | Answered
    | Closed
    | Linked
    | Withdrawn
    | Recovered
    | Restored,
    Field(discriminator="kind"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def read_event(text: str) -> Event:
    """An event from its canonical JSON; a pydantic ValidationError where it is none."""
    return _EVENT.validate_json(text)


class Row(Frozen):
    """One row: `hash` is over all the rest."""

    n: Annotated[int, Field(ge=1)]
    at: Annotated[str, Field(max_length=40)]
    event: Event
    prev: Digest
    hash: Digest

    @property
    def text(self) -> str:
        """The event as it is stored."""
        return self.event.canonical_bytes.decode()


def next_row(number: int, prev: str, at: str, event: Event) -> Row:
    """The row that follows number - 1."""
    digest = _hash(number, at, event.canonical_bytes.decode(), prev)
    return Row(n=number, at=at, event=event, prev=prev, hash=digest)


def opened_row(number: int, at: str, text: str, prev: str, digest: str, after: str) -> Row:
    """A row as it was read, once it follows the one before and is what was written.

    Args:
        after: the hash of the row before.

    Raises:
        TrustError: it was edited, or does not follow.
    """
    if prev != after or _hash(number, at, text, prev) != digest:
        raise TrustError(
            f"row {number} of the ledger was edited, or rows before it were removed or reordered: "
            "nothing is trained on until `fedseg-site ledger restore` has brought it back"
        )
    try:
        return Row(n=number, at=at, event=read_event(text), prev=prev, hash=digest)
    except ValidationError:
        raise TrustError(f"row {number} of the ledger is of another version of fedseg") from None


def patient_key(secret: bytes, patient: str) -> Patient:
    """What the ledger calls a patient: HMAC-SHA256 of the id.

    Args:
        secret: at least 32 random bytes that never leave the hospital; without them the charges of
            a patient cannot be found again.
        patient: the hospital's id, white space around it apart.

    Raises:
        ValueError: the secret is short, or the id empty.
    """
    if len(secret) < _LEAST_SECRET or not patient.strip():
        raise ValueError(f"an id and a secret of at least {_LEAST_SECRET} bytes are needed")
    return _keyed(secret, "patient", patient.strip())


def secret_check(secret: bytes) -> Digest:
    """By which a ledger knows its secret again."""
    return _keyed(secret, "check", "")


def blinded(secret: bytes, study: str, digest: str) -> Digest:
    """A head of the ledger in a form that tells others nothing, and the site that it is its own."""
    return _keyed(secret, "head", f"{study}\0{digest}")


def _keyed(secret: bytes, purpose: str, text: str) -> str:
    """A keyed hash, separate for every purpose."""
    return hmac.new(secret, f"fedseg ledger {purpose}\0{text}".encode(), hashlib.sha256).hexdigest()


def _hash(number: int, at: str, text: str, prev: str) -> str:
    """SHA-256 over a row."""
    return hashlib.sha256(json.dumps([number, at, text, prev]).encode()).hexdigest()
