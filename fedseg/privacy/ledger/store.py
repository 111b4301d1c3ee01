"""The ledger on disk: reserve before work, commit after; two processes cannot spend the same.

Every write decides and appends inside one BEGIN IMMEDIATE, on rows that it has read there, so what
a second process sees is what the first has left.

Order of a debit: the row, then the audit's entry, then the work. Order of an answer: seal and store
it, commit its digest, then let it out. A crash anywhere leaves the debit; work begins again under
the same reservation, with fresh noise; once a digest is committed no other answer ever goes out.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedseg.durable import make_folder
from fedseg.errors import DataError, PrivacyError, TrustError
from fedseg.privacy.accounting import PrivacyFilter, require_small_delta
from fedseg.privacy.ledger.book import Book, Debit, Limits
from fedseg.privacy.ledger.entries import (
    START,
    Answered,
    Closed,
    Event,
    Linked,
    Opened,
    Patient,
    Registered,
    Reserved,
    Retried,
    Row,
    Withdrawn,
    blinded,
    next_row,
    patient_key,
    secret_check,
)
from fedseg.privacy.ledger.file import MODE, connected, insert, read_rows
from fedseg.privacy.ledger.room import require_promise, require_room, require_room_for_all
from fedseg.privacy.ledger.witness import Seen, Witness
from fedseg.privacy.mechanisms import Mechanism, Use


@dataclass(frozen=True)
class Reservation:
    """A debit that was made, and what it stands at.

    Attributes:
        task: digest of the task's identity (study, plan, round, stage, model, attempt).
        mechanism: the only work that it pays for.
        attempt: 1 for the first time that work begins under it.
        answer: the digest of the stored answer: nothing is worked on, the stored bytes go out.
    """

    task: str
    study: str
    use: Use
    mechanism: Mechanism
    attempt: int
    answer: str | None


class Ledger:
    """One hospital's ledger. Make it with `create` or `open`."""

    def __init__(self, path: Path, secret: bytes, witness: Witness, now: Callable[[], str]) -> None:
        self._path = path
        self._secret = secret
        self._witness = witness
        self._now = now
        self._turn = threading.RLock()
        self._untold: list[Row] = []
        self._forget()

    @classmethod
    def create(
        cls, path: Path, secret: bytes, witness: Witness, now: Callable[[], str], limits: Limits
    ) -> Ledger:
        """Begin a ledger; the filter's order is fixed here, for the policy's budget in all.

        Raises:
            TrustError: the audit knows of a ledger: this one would forget what was spent.
            DataError: there is one already.
            PrivacyError: the budget has no room for anything.
        """
        if witness.seen():
            raise TrustError(
                "the audit knows of a ledger that is not here: a new one would forget what was "
                "spent; bring it back with `fedseg-site ledger restore`"
            )
        order = PrivacyFilter.for_budget(limits.total_epsilon, limits.total_delta).order
        ledger = cls(path, secret, witness, now)
        make_folder(path.parent, mode=0o700)
        path.touch(mode=MODE)

        def begin(book: Book) -> Event:
            if book.opened is not None:
                raise DataError("there is a ledger already")
            return Opened(secret_check=secret_check(secret), order=order)

        ledger._append(begin)
        return ledger

    @classmethod
    def open(cls, path: Path, secret: bytes, witness: Witness, now: Callable[[], str]) -> Ledger:
        """Open a ledger, once all of it is verified; rows the audit lacks are entered there.

        Raises:
            TrustError: it is missing, was edited, was rolled back, or the secret is another one.
        """
        ledger = cls(path, secret, witness, now)
        for row in ledger.verify():
            witness.record(row)
        return ledger

    def verify(self) -> list[Row]:
        """Read all of it again and hold it against the witness.

        Returns:
            The rows that the witness has not seen: work under them never began.

        Raises:
            TrustError: what is wrong, and where.
        """
        with self._turn:
            return self._verify()

    def _verify(self) -> list[Row]:
        seen = current(self._witness.seen())  # first: rows may be added in between
        self._forget()
        self._read_on()
        if self.book.opened is None or self.book.opened.secret_check != secret_check(self._secret):
            raise TrustError("the ledger was made with another secret, or was never finished")
        for each in seen:
            if not 0 < each.number <= len(self._rows):
                raise TrustError(
                    f"the ledger ends at row {len(self._rows)}, but the audit has seen row "
                    f"{each.number}: it was rolled back; `fedseg-site ledger restore` takes the "
                    "larger spend"
                )
            if self._rows[each.number - 1].hash != each.digest:
                raise TrustError(f"row {each.number} of the ledger is not what the audit has seen")
        numbers = {each.number for each in seen}
        start = seen[0].number if seen and seen[0].restored else 1
        return [row for row in self._rows[start - 1 :] if row.n not in numbers]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row, as last read."""
        return tuple(self._rows)

    def key_of(self, patient: str) -> Patient:
        """What the ledger calls a patient; see `patient_key`."""
        return patient_key(self._secret, patient)

    def refresh(self) -> Book:
        """What the ledger says now, other processes' rows included."""
        with self._turn:
            self._read_on()
            return self.book

    def register(
        self,
        event: Registered,
        limits: Limits,
        *,
        epsilon: float,
        delta: float,
    ) -> None:
        """Freeze a study's cohort and schedule, if all of it fits; at approval.

        The same register again is nothing new, or opens a study again that was closed, with what
        its schedule has left; another one is taken while nothing was reserved.

        Args:
            event: cohort and schedule. The schedule counts every attempt that may be answered.
            limits: the policy's.
            epsilon: what the plan promises to each patient.
            delta: likewise; it is written into the register.

        Raises:
            PrivacyError: the schedule costs more than the plan promises or the policy allows, a
                patient has too little left, or the register is frozen.
            DataError: a patient is in it twice, withdrawn, or under an old id.
        """
        if epsilon > limits.study_epsilon or delta > limits.study_delta:
            raise PrivacyError(
                f"the plan asks for epsilon {epsilon:g} at delta {delta:g}; the policy allows a "
                f"study {limits.study_epsilon:g} at {limits.study_delta:g}"
            )
        require_small_delta(delta, len(event.train) + len(event.val))
        require_promise(event.schedule, epsilon, delta)

        dated = event.model_copy(update={"delta": delta})
        undated = event.model_copy(update={"delta": None})

        def decide(book: Book) -> Event | None:
            study = book.studies.get(event.study)
            wanted = undated if study is not None and study.registered == undated else dated
            if study is not None and study.registered == wanted and not study.closed:
                return None
            book.require_new_register(wanted)
            require_room_for_all(book, wanted, limits)
            return wanted

        self._append(decide)

    def reserve(
        self, task: str, study: str, use: Use, mechanism: Mechanism, limits: Limits
    ) -> Reservation:
        """Debit the patients before work starts; or find the debit that this task has.

        Where `answer` is set, the stored answer goes out again and nothing is worked on.

        Raises:
            PrivacyError: no budget, not in the schedule, or the task was reserved for other work.
            TrustError: the ledger or the audit was changed: nothing goes on.
            StorageError: it could not be written; whether it was debited shows at the next try.
        """
        wanted = Reserved(reservation=task, study=study, use=use, mechanism=mechanism)

        def decide(book: Book) -> Event | None:
            debit = book.debits.get(task)
            if debit is not None:
                _require_same_work(debit, wanted)
                again = Retried(reservation=task, study=study, use=use, mechanism=mechanism)
                return again if debit.answer is None else None
            cohort = book.require_allowed(wanted).cohort(use)
            require_room(book, cohort, mechanism, limits)
            return wanted

        self._append(decide)
        debit = self.book.debits[task]
        return Reservation(task, study, use, mechanism, debit.attempts, debit.answer)

    def commit(self, task: str, answer: str) -> None:
        """Bind a reservation to its one answer; only what is bound may leave.

        Args:
            task: the reservation.
            answer: SHA-256 of the sealed bytes, which are on disk by now.

        Raises:
            PrivacyError: there is no reservation, or it has another answer.
        """

        def decide(book: Book) -> Event | None:
            debit = book.debits.get(task)
            if debit is None:
                raise PrivacyError("an answer without a debit must not leave: reserve first")
            if debit.answer not in (None, answer):
                raise PrivacyError(
                    "this reservation has another answer already: the stored one may go out "
                    "again, a second one never"
                )
            return Answered(reservation=task, answer=answer) if debit.answer is None else None

        self._append(decide)

    def close(self, study: str, reason: str) -> None:
        """End a study, or the site's part in it: what it had not used is free for others."""

        def decide(book: Book) -> Event | None:
            if study not in book.studies:
                raise DataError(f"the ledger has no study {study}")
            if book.studies[study].closed is not None:
                return None
            return Closed(study=study, reason=reason)

        self._append(decide)

    def link(self, old: tuple[Patient, ...], new: tuple[Patient, ...], reason: str) -> None:
        """Records were moved, split or merged: every new id carries what the old ones spent."""
        event = Linked(old=old, new=new, reason=reason)
        self._append(lambda _: event)

    def withdraw(self, patient: Patient, reason: str) -> tuple[Debit, ...]:
        """A patient withdraws: the data are not used again; what they went into is returned.

        What was released cannot be taken back; the registers keep the patient, who contributes
        zero and is still charged.
        """

        def decide(book: Book) -> Event | None:
            return None if patient in book.withdrawn else Withdrawn(patient=patient, reason=reason)

        self._append(decide)
        return self.book.went_into(patient)

    def blinded_head(self, study: str) -> str:
        """The head for an answer to carry: outside, it says nothing, not even how many rows."""
        with self._turn:
            self._read_on()
            return blinded(self._secret, study, self._head)

    def acknowledge(self, study: str, claimed: str) -> None:
        """Accept the head that a task acknowledges: one that this ledger had.

        One that a declared restore has lost is known from the audit. Where the audit was put back
        too, any is accepted for a study of which all is charged: whatever was done, it is paid for.

        Raises:
            TrustError: it never had it: the whole folder was rolled back, or the task is not for
                this site.
        """
        with self._turn:
            self._read_on()
            rows = [row.hash for row in self._rows]
            declared = bool(self.book.restored) and study in self.book.studies
            if declared and not self.book.left(study):
                return
        if not (self._among(rows, study, claimed) or self._among(self._told(), study, claimed)):
            raise TrustError(
                "the coordinator has seen a state of this ledger that is not in it: the site's "
                "folder was put back to an older one; declare it with `fedseg-site ledger restore`"
            )

    def _among(self, digests: Iterable[str], study: str, claimed: str) -> bool:
        """Whether a blinded head is one of these."""
        return any(blinded(self._secret, study, each) == claimed for each in digests)

    def _told(self) -> Iterator[str]:
        """Every head that the audit knows, those before a restore too."""
        return (each.digest for each in self._witness.seen())

    def _append(self, decide: Callable[[Book], Event | None]) -> None:
        """Decide on the newest state and write, with nobody else in between."""
        with self._turn:
            self._tell()
            self._write(decide)
            self._tell()

    def _tell(self) -> None:
        """Have the witness record what it could not before: nothing goes on without."""
        while self._untold:
            self._read_on()
            row = self._untold[0]
            if row in self._rows[row.n - 1 : row.n]:  # its commit was not cut short
                self._witness.record(row)
            self._untold.pop(0)

    def _write(self, decide: Callable[[Book], Event | None]) -> None:
        """One transaction."""
        with connected(self._path) as database:
            database.execute("BEGIN IMMEDIATE")
            self._read_on(database)
            event = decide(self.book)
            if event is None:
                database.execute("ROLLBACK")
                return
            row = next_row(len(self._rows) + 1, self._head, self._now(), event)
            insert(database, row)
            self._untold.append(row)
            database.execute("COMMIT")
        self._take(row)

    def _read_on(self, database: sqlite3.Connection | None = None) -> None:
        """Read the rows that are new, and that the last known one is still there."""
        if database is None:
            with connected(self._path) as opened:
                self._read_on(opened)
            return
        known = len(self._rows)
        query = "SELECT n, at, event, prev, hash FROM rows WHERE n >= ? ORDER BY n"
        found = iter(database.execute(query, (max(known, 1),)))
        if known:
            last = next(found, None)
            if last is None or last[0] != known or last[4] != self._head:
                raise TrustError("the ledger was put back to an older state while it was in use")
        for row in read_rows(found, known, self._head):
            self._take(row)

    def _take(self, row: Row) -> None:
        self._rows.append(row)
        self.book.apply(row.event, row.at)

    @property
    def _head(self) -> str:
        return self._rows[-1].hash if self._rows else START

    def _forget(self) -> None:
        self._rows: list[Row] = []
        self.book = Book()


def current(seen: list[Seen]) -> list[Seen]:
    """What the witness says of the ledger as it is since it was last restored."""
    starts = [index for index, each in enumerate(seen) if each.restored]
    return seen[starts[-1] :] if starts else seen


def _require_same_work(debit: Debit, wanted: Reserved) -> None:
    """Refuse a reservation for other work than it was made for."""
    same = (debit.study, debit.use, debit.mechanism)
    if same != (wanted.study, wanted.use, wanted.mechanism):
        raise PrivacyError(
            "this task was reserved for other work (study, use, noise, rate or steps differ)"
        )
