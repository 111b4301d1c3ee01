"""Private work at a site: paid for before it begins, and answered once.

Each task that touches patients under a guarantee has a reservation in the hospital's ledger. Its
order: debit; work; the answer's file, whole; its digest in the ledger; only then does it leave. A
crash before the file costs nothing again and the work begins anew, with fresh noise; after it the
file is what is answered. What was committed is read from its file and nothing else: a second answer
would be a second release, for which nobody paid.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from fedseg.arrays import Arrays
from fedseg.container import packed, unpack
from fedseg.durable import make_folder, write_atomically
from fedseg.errors import PrivacyError, StorageError, TrustError
from fedseg.frozen import Digest, Frozen
from fedseg.imaging.cases import Cohort
from fedseg.plan import StudyPlan
from fedseg.privacy.ledger import Ledger, Limits
from fedseg.privacy.schedule import mechanism_of
from fedseg.updates import Body, TaskHeader, answer_limit
from sites.answers import PLAIN_ROUNDS_KEPT

_SUFFIX = ".answer"
_LOCK = "answers.lock"


class _Stored(Frozen):
    """An answer in its file."""

    format: Literal["fedseg-spent/1"] = "fedseg-spent/1"
    reservation: Digest
    body: Body


def reservation_of(header: TaskHeader) -> str:
    """The identity under which a task is paid for: study, plan, round, stage and model.

    Not the attempt: a round that is asked for again, because other sites failed, gets the same
    answer. Another model is another release.
    """
    task = [header.study, header.plan, header.round, header.stage, header.model]
    return hashlib.sha256(json.dumps(task, separators=(",", ":")).encode()).hexdigest()


class Account:
    """What one private study at one site draws on."""

    def __init__(
        self, ledger: Ledger, plan: StudyPlan, folder: Path, limits: Callable[[], Limits]
    ) -> None:
        """Make an account.

        Args:
            ledger: the hospital's; the study is registered in it.
            plan: private and built.
            folder: for the answers, one file a reservation.
            limits: what the hospital's policy allows, asked anew for every debit.
        """
        self._ledger, self._plan, self._folder, self._limits = ledger, plan, folder, limits

    def answer(
        self, header: TaskHeader, work: Callable[[], tuple[Body, Arrays | None]]
    ) -> tuple[Body, Arrays | None]:
        """The one answer to a task: from its file, or worked for, stored and committed.

        Args:
            header: of a task to train, or to evaluate with noise.
            work: trains or evaluates; what it returns is what leaves, with nothing to withhold any
                more. It may be called again after it raised, so that it must not raise for what
                its data are.

        Raises:
            PrivacyError: no budget, another plan than was registered, or nothing of the schedule
                is left. Nothing was worked on.
            TrustError: ledger or audit were changed, or the stored answer is not what it was.
            StorageError: a full disk; the next try goes on from there.
        """
        self._require_this_plan()
        use: Literal["train", "val"] = "train" if header.stage == "train" else "val"
        mechanism, task = mechanism_of(self._plan, use), reservation_of(header)
        path = self._folder / f"{header.round:06d}-{header.stage}-{task}{_SUFFIX}"
        with self._alone():
            study = self._plan.study
            found = self._ledger.reserve(task, study, use, mechanism, self._limits())
            if found.answer is None and not path.exists():
                body, delta = work()
                stored = _Stored(reservation=task, body=body)
                write_atomically(path, packed(stored, delta), mode=0o600)
            data = _bytes(path)
            digest = hashlib.sha256(data).hexdigest()
            if found.answer not in (None, digest):
                raise TrustError("a stored answer is not what the ledger says was answered")
            answer = self._opened(data, task)
            if found.answer is None:
                self._ledger.commit(task, digest)
                self._clear(header.round)
            return answer

    def require_registered(self, cohort: Cohort) -> None:
        """Check that all of a cohort's patients are charged for, in the use that they are in.

        Raises:
            PrivacyError: the study is registered for another plan, or somebody is not charged.
        """
        self._require_this_plan()
        study = self._ledger.refresh().studies[self._plan.study]
        for use in ("train", "val"):
            named = {self._ledger.key_of(patient) for patient in cohort.split(use).patients}
            if strangers := len(named - study.cohort(use)):
                raise PrivacyError(
                    f"{strangers} patients of the cohort ({use}) are not in the ledger's register "
                    f"of {self._plan.study}: nobody would be charged for them; approve the plan "
                    "again, or put the cohort back to what was approved"
                )

    def withdrawn(self, patients: Iterable[str]) -> frozenset[str]:
        """Those of the patients who withdrew since the register was frozen."""
        book = self._ledger.refresh()
        if not book.withdrawn:
            return frozenset()
        return frozenset(p for p in patients if book.has_withdrawn(self._ledger.key_of(p)))

    def acknowledge(self, claimed: str | None) -> None:
        """Accept the head that a task brings back, if it brings one.

        Raises:
            TrustError: this ledger never had it: it was put back to an older state.
        """
        if claimed is not None:
            self._ledger.acknowledge(self._plan.study, claimed)

    @property
    def head(self) -> str:
        """The ledger's head, blinded, for an answer to carry."""
        return self._ledger.blinded_head(self._plan.study)

    def _require_this_plan(self) -> None:
        """Refuse to charge for another plan than the one whose schedule is in the ledger."""
        study = self._ledger.refresh().studies.get(self._plan.study)
        if study is None or study.registered.plan != self._plan.digest:
            state = "not registered" if study is None else "registered for another plan"
            raise PrivacyError(
                f"the study {self._plan.study} is {state} in the ledger: approve the plan first"
            )

    def _opened(self, data: bytes, task: str) -> tuple[Body, dict[str, NDArray[Any]] | None]:
        """What a stored answer says."""
        limit = answer_limit(self._plan, "train")
        stored, delta = unpack(data, _Stored, max_bytes=limit, schema=None)
        if stored.reservation != task:
            raise TrustError("a stored answer belongs to another task")
        return stored.body, delta or None

    def _clear(self, newest: int) -> None:
        """Remove answers to rounds that nobody goes back to; they are never worked for again."""
        for path in self._folder.glob(f"*{_SUFFIX}"):
            number = path.name.partition("-")[0]
            if number.isdigit() and int(number) <= newest - PLAIN_ROUNDS_KEPT:
                path.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process answers at a time: two would store two answers to one task."""
        try:
            make_folder(self._folder, mode=0o700)
            lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(f"answers cannot be stored: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _bytes(path: Path) -> bytes:
    """A stored answer."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise TrustError(
            "this task was answered and its answer is not kept any more; a second one would be a "
            "second release"
        ) from None
    except OSError as error:
        raise StorageError(f"a stored answer cannot be read: {error.strerror}") from error
