"""The audit: an append-only log in which any edit, removal or reordering shows.

One JSON line an entry. Each names the hash of the entry before it and is signed; beside the log, a
signed head says how many there are, so that a missing tail shows too. The line is on disk before
the head: after a crash the log may be ahead of the head, never behind it, and entries that chain on
with good signatures count. A line that a crash tore is cut at the next append and recorded. Several
processes may append; a lock on the log orders them.

What does not show: a log and a head both put back to what they once were. Keep a copy of the head
elsewhere now and then; a restored backup is to be declared as an entry.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedseg.durable import write_atomically
from fedseg.errors import StorageError, TrustError
from fedseg.frozen import Digest, Frozen
from fedseg.security.documents import (
    UNSIGNED,
    Signature,
    from_text,
    open_document,
    signable,
    to_text,
)
from fedseg.security.keys import SIGNATURE_BYTES, SigningKey, VerifyKey

MAX_LINE_BYTES = 64 * 1024
TORN = "torn_line"
START = "0" * 64
_ENTRY, _HEAD = "audit entry", "audit head"
_MODE = 0o600

Fact = str | int | float | bool | list[str] | None


class Entry(Frozen):
    """One event. `hash` is over all before it in this list; `signature` is over `hash`."""

    n: Annotated[int, Field(ge=1)]
    at: Annotated[str, Field(max_length=40)]
    event: Annotated[str, Field(pattern=r"^[a-z][a-z_]{0,39}$")]
    facts: dict[str, Fact]
    prev: Digest
    hash: Digest
    signature: Signature


class _Head(Frozen):
    """How many entries there are, and the hash of the last."""

    format: Literal["fedseg-head/1"] = "fedseg-head/1"
    n: Annotated[int, Field(ge=0)]
    hash: Digest
    signature: Signature


class Chain:
    """Appends to one log."""

    def __init__(self, path: Path, signer: SigningKey, now: Callable[[], str]) -> None:
        self._path = path
        self._signer = signer
        self._now = now

    def append(self, event: str, /, **facts: Fact) -> Entry:
        """Record an event; it is on disk when this returns.

        Raises:
            TrustError: the log was changed, or its tail is missing: nothing is appended.
            StorageError: the disk is full; the event is not to be taken as recorded.
        """
        with _locked(self._path) as log:
            end, torn = _whole_lines(log)
            last = self._last(log, end)
            if torn:
                os.ftruncate(log, end)
                last = self._write(log, last, TORN, {"bytes": torn})
            return self._write(log, last, event, facts)

    def _last(self, log: int, end: int) -> Entry | None:
        """The last entry, once log and head agree."""
        key = self._signer.public
        last = _last_entry(log, end)
        if last is None and not _head_path(self._path).exists():
            self._write_head(0, START)
        if last is not None:
            _check_entry(last, key)
        _check_tail(last, _read_head(self._path, key))
        return last

    def _write(self, log: int, last: Entry | None, event: str, facts: dict[str, Fact]) -> Entry:
        """Append one entry, then move the head."""
        entry = self._entry(last, event, facts)
        line = entry.canonical_bytes + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"an entry of the audit has at most {MAX_LINE_BYTES} bytes")
        end = os.lseek(log, 0, os.SEEK_END)
        try:
            _write_all(log, line)
            os.fsync(log)
        except OSError as error:
            os.ftruncate(log, end)
            raise StorageError(
                f"cannot write {self._path.name}: {error.strerror}; nothing goes on unrecorded, "
                "make room first"
            ) from error
        self._write_head(entry.n, entry.hash)
        return entry

    def _entry(self, last: Entry | None, event: str, facts: dict[str, Fact]) -> Entry:
        """The entry after `last`."""
        number, prev = (last.n + 1, last.hash) if last else (1, START)
        draft = Entry(
            n=number,
            at=self._now(),
            event=event,
            facts=facts,
            prev=prev,
            hash=START,
            signature=UNSIGNED,
        )
        digest = _hash(draft)
        signature = to_text(self._signer.sign(_ENTRY, bytes.fromhex(digest)))
        return draft.model_copy(update={"hash": digest, "signature": signature})

    def _write_head(self, number: int, digest: str) -> None:
        """Replace the head."""
        head = _Head(n=number, hash=digest, signature=UNSIGNED)
        signature = to_text(self._signer.sign(_HEAD, signable(head)))
        signed = head.model_copy(update={"signature": signature})
        write_atomically(_head_path(self._path), signed.canonical_bytes + b"\n", mode=_MODE)


def read_chain(path: Path) -> list[Entry]:
    """All entries as they stand, unverified; a line without an end is not one yet.

    Raises:
        TrustError: there is no log, or a line is not an entry.
    """
    return [entry for _, entry in _entries(path)]


def verify_chain(path: Path, key: VerifyKey) -> list[Entry]:
    """All entries, once nothing is seen to be edited, removed, added or reordered.

    Args:
        path: the log; its head stands beside it.
        key: the public half of the key that signs the log.

    Raises:
        TrustError: names the first entry that is not what was written, or says that the tail is
            missing.
    """
    head = _read_head(path, key)  # first: an append in between moves the log ahead, which is fine
    entries: list[Entry] = []
    for line, entry in _entries(path):
        last = entries[-1] if entries else None
        if (entry.n, entry.prev) != ((last.n + 1, last.hash) if last else (1, START)):
            raise TrustError(
                f"line {line} of the audit is entry {entry.n}, which does not follow entry "
                f"{last.n if last else 0}: entries were removed, added or reordered there"
            )
        _check_entry(entry, key)
        if entry.n == head.n and entry.hash != head.hash:
            raise TrustError(f"entry {entry.n} of the audit is not the one that the head names")
        entries.append(entry)
    _check_tail(entries[-1] if entries else None, head)
    return entries


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The log, open and ours alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, _MODE)
    except OSError as error:
        raise StorageError(f"cannot open {path.name}: {error.strerror}") from error
    try:
        fcntl.flock(log, fcntl.LOCK_EX)
        yield log
    finally:
        os.close(log)


def _whole_lines(log: int) -> tuple[int, int]:
    """Where the last whole line ends, and how many torn bytes follow."""
    size = os.lseek(log, 0, os.SEEK_END)
    tail = _before(log, size)
    torn = len(tail) - (tail.rfind(b"\n") + 1)
    if torn > MAX_LINE_BYTES:
        raise TrustError("the end of the audit is not a line that a crash tore: it was changed")
    return size - torn, torn


def _last_entry(log: int, end: int) -> Entry | None:
    """The line that ends at `end`, or None where the log is empty."""
    tail = _before(log, end)
    if not tail:
        return None
    return _parsed(tail[tail[:-1].rfind(b"\n") + 1 :], "the last line of the audit")


def _before(log: int, end: int) -> bytes:
    """What stands before a place, more than the longest line."""
    room = min(end, 2 * MAX_LINE_BYTES)
    return os.pread(log, room, end - room)


def _entries(path: Path) -> Iterator[tuple[int, Entry]]:
    """Every line by number."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise TrustError(f"line {number} of the audit is too long to be one of ours")
                if not line.endswith(b"\n"):
                    return  # torn, or being written now: its rest would not be a line
                yield number, _parsed(line, f"line {number} of the audit")
    except OSError as error:
        raise TrustError(f"cannot read the audit {path.name}: {error.strerror}") from None


def _parsed(line: bytes, what: str) -> Entry:
    """One entry, its own hash and signature unchecked."""
    return open_document(line, Entry, max_bytes=MAX_LINE_BYTES, what=what)


def _check_entry(entry: Entry, key: VerifyKey) -> None:
    """Raise where an entry is not what the key signed."""
    digest = _hash(entry)
    try:
        if digest != entry.hash:
            raise TrustError("hash")
        signature = from_text(entry.signature, SIGNATURE_BYTES, "the signature")
        key.verify(_ENTRY, bytes.fromhex(digest), signature)
    except TrustError:
        raise TrustError(
            f"entry {entry.n} of the audit was edited after it was written, or is not by this key"
        ) from None


def _check_tail(last: Entry | None, head: _Head) -> None:
    """Raise where the log ends before its head, or with another entry."""
    number, digest = (last.n, last.hash) if last else (0, START)
    if number < head.n:
        raise TrustError(
            f"the audit ends at entry {number}, but its head says {head.n}: the tail is missing"
        )
    if number == head.n and digest != head.hash:
        raise TrustError(f"entry {number} of the audit is not the one that the head names")


def _hash(entry: Entry) -> str:
    """SHA-256 of an entry without hash and signature."""
    blank = entry.model_copy(update={"hash": START})
    return hashlib.sha256(signable(blank)).hexdigest()


def _read_head(path: Path, key: VerifyKey) -> _Head:
    """The head of a log, verified."""
    place = _head_path(path)
    try:
        data = place.read_bytes()
    except OSError as error:
        raise TrustError(
            f"cannot read the audit's head {place.name}: {error.strerror}; without it nobody can "
            "say whether the end of the log is missing"
        ) from None
    head = open_document(data, _Head, max_bytes=4096, what="the audit's head")
    key.verify(_HEAD, signable(head), from_text(head.signature, SIGNATURE_BYTES, "the signature"))
    return head


def _head_path(path: Path) -> Path:
    """Where the head of a log is."""
    return path.with_suffix(".head")


def _write_all(log: int, data: bytes) -> None:
    """Write all of it: a single write may stop half way on a disk that fills."""
    while data:
        data = data[os.write(log, data) :]
