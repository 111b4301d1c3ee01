"""Bringing a ledger back: a declared act that takes the larger spend, and is in the audit.

From every copy at hand (what is left of the ledger, backups) the longest sound beginning is read.
The copy that the audit knows best is the base; whatever debit, answer, link or withdrawal another
copy or the audit knows of and the base lacks is written behind it. So the spend is never less than
in any copy, nor than the audit has seen. A debit whose register is lost is charged to everyone, and
the study ends: nobody knows who was in it.
The daemon is stopped meanwhile; work that begins under the old file is refused afterwards.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from fedseg.durable import make_folder, sync_folder
from fedseg.errors import StorageError, TrustError
from fedseg.privacy.accounting import PrivacyFilter
from fedseg.privacy.ledger.book import Book, Limits
from fedseg.privacy.ledger.entries import (
    START,
    Answered,
    Closed,
    Event,
    Linked,
    Opened,
    Recovered,
    Registered,
    Reserved,
    Restored,
    Retried,
    Row,
    Withdrawn,
    next_row,
    secret_check,
)
from fedseg.privacy.ledger.file import MODE, connect, insert, read_rows
from fedseg.privacy.ledger.store import Ledger
from fedseg.privacy.ledger.witness import Seen, Witness


def restore(
    path: Path,
    backups: Sequence[Path],
    secret: bytes,
    witness: Witness,
    now: Callable[[], str],
    *,
    limits: Limits,
    reason: str,
    to_the_end: bool = False,
) -> tuple[Ledger, int]:
    """Put a ledger in place that has lost no debit that anyone remembers.

    Args:
        path: where the ledger is, or was.
        backups: copies of it; there may be none, then the audit alone says what was spent.
        limits: fix the filter's order where no copy is sound.
        reason: goes into ledger and audit.
        to_the_end: the witness was put back as well, and nobody knows what was done since: open
            studies are charged with all that their schedules have left, and closed.

    Returns:
        The ledger, and how many debits had to be written anew.

    Raises:
        TrustError: the audit was changed; or a copy was made with another secret.
        StorageError: it could not be written; the old file is untouched.
    """
    seen = witness.seen()
    _settle(path)
    copies = [rows for place in (path, *backups) if (rows := sound_rows(place))]
    if any(_check(rows) != secret_check(secret) for rows in copies):
        raise TrustError("a copy of the ledger was made with another secret: it is not this site's")
    base = max(copies, key=lambda rows: (_known(rows, seen), len(rows)), default=[])
    if not base:
        order = PrivacyFilter.for_budget(limits.total_epsilon, limits.total_delta).order
        base = [next_row(1, START, now(), Opened(secret_check=secret_check(secret), order=order))]
    added, recovered = _missing(base, copies, seen)
    if to_the_end:
        rest = _to_the_end([*(row.event for row in base), *added], reason)
        recovered += sum(isinstance(each, Recovered) for each in rest)
        added += rest
    rows = list(base)
    for event in [*added, Restored(recovered=recovered, reason=reason)]:
        rows.append(next_row(len(rows) + 1, rows[-1].hash, now(), event))
    _replace(path, rows)
    told = {each.digest for each in seen}
    for row in rows[:-1]:
        if row.hash not in told:  # so that the next backup cannot lose it again
            witness.record(row)
    witness.record(rows[-1], restored=True)
    return Ledger.open(path, secret, witness, now), recovered


def sound_rows(path: Path) -> list[Row]:
    """The longest beginning of a copy in which nothing was edited; maybe none."""
    found: list[Row] = []
    if not path.is_file():
        return found
    address = f"file:{quote(str(path.absolute()))}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True)) as database:
            rows = database.execute("SELECT n, at, event, prev, hash FROM rows ORDER BY n")
            for row in read_rows(rows, 0, START):
                found.append(row)
    except (sqlite3.Error, TrustError):
        return found
    return found


def _settle(path: Path) -> None:
    """Let SQLite undo what a crash left half written in the ledger itself."""
    with suppress(sqlite3.Error):
        if path.is_file():
            with closing(sqlite3.connect(path)) as database:
                database.execute("SELECT count(*) FROM rows")


def _check(rows: Sequence[Row]) -> str | None:
    """By which the secret of a copy is known."""
    first = rows[0].event
    return first.secret_check if isinstance(first, Opened) else None


def _known(rows: Sequence[Row], seen: Sequence[Seen]) -> int:
    """How many rows of a copy the witness has seen."""
    hashes = {row.hash for row in rows}
    return len({each.digest for each in seen} & hashes)


def _missing(
    base: Sequence[Row], copies: Iterable[Sequence[Row]], seen: Sequence[Seen]
) -> tuple[list[Event], int]:
    """What others remember and the base has lost, and how many debits of it."""
    book = Book()
    for row in base:
        book.apply(row.event, row.at)
    present = {row.text for row in base}
    read = {row.hash for rows in copies for row in rows}
    lost_registers = {each.register for each in seen if each.register and each.digest not in read}
    added: list[Event] = []
    for event in [*(row.event for rows in copies for row in rows), *_told(seen, lost_registers)]:
        lost = _lost(book, event, present)
        if lost is not None:
            book.apply(lost, "")
            present.add(lost.canonical_bytes.decode())
            added.append(lost)
    for name in sorted(lost_registers & {n for n, each in book.studies.items() if not each.closed}):
        added.append(Closed(study=name, reason="its last register was lost with the ledger"))
    return added, sum(isinstance(each, Recovered) for each in added)


def _told(seen: Sequence[Seen], lost_registers: Collection[str]) -> Iterator[Event]:
    """What the audit remembers; a debit of a study whose last register is lost is everyone's."""
    for each in seen:
        if isinstance(each.event, Recovered) and each.event.study in lost_registers:
            yield each.event.model_copy(update={"everyone": True})
        elif each.event is not None:
            yield each.event


def _to_the_end(events: Sequence[Event], reason: str) -> list[Event]:
    """All that open studies may still have done, and their end."""
    book = Book()
    for event in events:
        book.apply(event, "")
    found: list[Event] = []
    for name in [name for name, study in book.studies.items() if study.closed is None]:
        for each in book.left(name):
            rest = _other(name, each.canonical_bytes.decode())
            found.append(
                Recovered(reservation=rest, study=name, use=each.use, mechanism=each.mechanism)
            )
        found.append(Closed(study=name, reason=reason))
    return found


def _lost(book: Book, event: Event, present: set[str]) -> Event | None:
    """What has to be written for an event that another copy or the audit knows, if anything."""
    match event:
        case Registered():
            return _lost_register(book, event)
        case Reserved() | Retried() | Recovered():
            return _lost_debit(book, event)
        case Answered():
            return _lost_answer(book, event)
        case Closed():
            study = book.studies.get(event.study)
            known = event.canonical_bytes.decode() in present  # and the study opened again, maybe
            return None if known or study is None or study.closed else event
        case Linked() | Withdrawn():
            return None if event.canonical_bytes.decode() in present else event
        case Opened() | Restored():
            return None


def _lost_register(book: Book, event: Registered) -> Event | None:
    """A register that the base lacks; where it has another, the patients of both."""
    study = book.studies.get(event.study)
    if study is None:
        return event
    have = study.registered
    train = tuple(sorted({*have.train, *event.train}))
    val = tuple(sorted({*have.val, *event.val}))
    if (set(train), set(val)) == (set(have.train), set(have.val)):
        return None
    return have.model_copy(update={"train": train, "val": val})


def _lost_debit(book: Book, event: Reserved | Retried | Recovered) -> Event | None:
    """A debit that the base lacks; one for other work under the same name is charged as well."""
    debit = book.debits.get(event.reservation)
    name = event.reservation
    if debit is not None:
        same = (debit.study, debit.use, debit.mechanism)
        if same == (event.study, event.use, event.mechanism):
            return None
        name = _other(event.reservation, event.mechanism.canonical_bytes.decode())
        if name in book.debits:
            return None
    return Recovered(
        reservation=name, study=event.study, use=event.use, mechanism=event.mechanism,
        everyone=isinstance(event, Recovered) and event.everyone,
    )  # fmt: skip


def _lost_answer(book: Book, event: Answered) -> Event | None:
    """An answer that the base lacks; a second answer to one debit is a second debit."""
    debit = book.debits.get(event.reservation)
    if debit is None or debit.answer == event.answer:
        return None
    if debit.answer is None:
        return event
    name = _other(event.reservation, event.answer)
    if name in book.debits:
        return None
    return Recovered(reservation=name, study=debit.study, use=debit.use, mechanism=debit.mechanism)


def _other(name: str, text: str) -> str:
    """A name of its own for a debit whose name is taken."""
    return hashlib.sha256(f"{name}\0{text}".encode()).hexdigest()


def _replace(path: Path, rows: Sequence[Row]) -> None:
    """Write a new file and put it in place of the old one, whole or not at all."""
    draft = path.with_name(f".{path.name}.restoring")
    try:
        make_folder(path.parent, mode=0o700)
        for leftover in (draft, _journal(draft)):
            leftover.unlink(missing_ok=True)
        draft.touch(mode=MODE)
        with closing(connect(draft)) as database:
            database.execute("BEGIN IMMEDIATE")
            for row in rows:
                insert(database, row)
            database.execute("COMMIT")
        _journal(path).unlink(missing_ok=True)  # it belongs to the file that goes
        draft.replace(path)
        sync_folder(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"the ledger could not be restored: {error}") from error


def _journal(path: Path) -> Path:
    """Where SQLite keeps the rollback journal of a file."""
    return path.with_name(path.name + "-journal")
