"""What a site has answered: a task that comes again gets its answer again and trains nothing.

A folder a round and stage. A task is known by its digest: that it was begun is on disk before any
work starts, and work is never begun on more attempts at a stage than the plan has. A coordinator
that was started again, and has seen more of the sites' ledgers meanwhile, asks for the same attempt
in another task: that is no attempt more. Once the work is done its plain answer is kept, then the
sealed one, each whole or not at all. So a crash costs at most the work that was open, and a
coordinator that lost its receiving key gets the same answer under a new one. Plain answers are kept
for the rounds that a coordinator restored from a backup may go back to, sealed ones for the last
few.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import get_args

from fedseg.durable import make_folder, whole, write_atomically
from fedseg.errors import StorageError, TrustError
from fedseg.updates import StageName, TaskHeader

PLAIN_ROUNDS_KEPT = 20
SEALED_ROUNDS_KEPT = 3
MOST_KEYS = 8
MOST_TASKS = 32  # that ask for one attempt at a stage, each acknowledging something else
STAGES: tuple[str, ...] = get_args(StageName)
_SLOT = re.compile(r"(\d{6,10})-([a-z_]{1,32})(?:-([A-Za-z0-9][A-Za-z0-9_.-]{0,63}))?")


@dataclass(frozen=True)
class Slot:
    """A stage of a round; `owner` is the site whose own model it is about, if it is one's."""

    round: int
    stage: str
    owner: str | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        stage = f"{self.round:06d}-{self.stage}"
        return stage if self.owner is None else f"{stage}-{self.owner}"


def slot_of(said: TaskHeader) -> Slot:
    """The stage that a task asks for."""
    return Slot(said.round, said.stage, said.owner)


class Answers:
    """The begun and answered tasks of one study at one site."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begun(self, slot: Slot) -> dict[str, str]:
        """The tasks of a stage on which work was begun, by digest: which attempt each asks for."""
        paths = (self._folder / slot.name).glob("*.begun")
        return {path.stem: path.read_text("ascii") or path.stem for path in paths}

    def begin(
        self, slot: Slot, about: str, attempts: int | None, *, attempt: str | None = None
    ) -> None:
        """Note that work on a task begins; it is on disk when this returns.

        Args:
            attempts: on how many different attempts at this stage work may ever be begun; None:
                any.
            attempt: names the attempt that the task asks for; by default the task is one itself.

        Raises:
            TrustError: another model came for a stage that was served as often as the plan allows,
                or the round is so old that its answers were cleared away.
            StorageError: it could not be written.
        """
        served, last, attempt = self.begun(slot), self.last, attempt or about
        if attempts is not None and last and slot.round <= last.round - PLAIN_ROUNDS_KEPT:
            raise TrustError(f"a task of round {slot.round} came, the site is at {last.round}")
        if about in served:
            return
        made = set(served.values())
        if attempts is not None and attempt not in made and len(made) >= attempts:
            raise TrustError(
                f"{len(made)} attempts at round {slot.round}, stage {slot.stage}, were served, all "
                "that the plan's attempts allow, and another one came"
            )
        if attempts is not None and list(served.values()).count(attempt) >= MOST_TASKS:
            raise TrustError(f"one attempt at round {slot.round} is asked for in ever new tasks")
        write_atomically(self._path(slot, about, "begun"), attempt.encode("ascii"), mode=0o600)
        self._clear(slot.round)

    def sealed(self, slot: Slot, about: str, reply_to: str) -> Path | None:
        """The stored answer for this receiving key, or None."""
        path = self._path(slot, f"{about}.{_short(reply_to)}", "sealed")
        return path if path.exists() else None

    @contextmanager
    def sealing(self, slot: Slot, about: str, reply_to: str) -> Iterator[BufferedRandom]:
        """A file to seal an answer into; it is durable when the block ends, or not there at all.

        Raises:
            TrustError: it was sealed for as many receiving keys as no coordinator loses.
            StorageError: it could not be written.
        """
        if len(list((self._folder / slot.name).glob(f"{about}.*.sealed"))) >= MOST_KEYS:
            raise TrustError(f"an answer of round {slot.round} is asked for under ever new keys")
        with _stored(self._path(slot, f"{about}.{_short(reply_to)}", "sealed")) as file:
            yield file

    def plain(self, slot: Slot, about: str) -> bytes | None:
        """The stored answer before it was sealed, or None."""
        try:
            return self._path(slot, about, "plain").read_bytes()
        except FileNotFoundError:
            return None

    def keep(self, slot: Slot, about: str, answer: bytes) -> None:
        """Store an answer before it is sealed.

        Raises:
            StorageError: it could not be written.
        """
        write_atomically(self._path(slot, about, "plain"), answer, mode=0o600)

    @property
    def last(self) -> Slot | None:
        """The last round and stage on which work was begun, or None."""
        return max(self._slots(), key=_place, default=None)

    def _clear(self, newest: int) -> None:
        """Remove what is too old to be asked for; that it was begun stays known."""
        kept = {"sealed": SEALED_ROUNDS_KEPT, "plain": PLAIN_ROUNDS_KEPT}
        for slot in self._slots():
            for kind, rounds in kept.items():
                if slot.round <= newest - rounds:
                    for path in (self._folder / slot.name).glob(f"*.{kind}*"):  # and its .part
                        path.unlink(missing_ok=True)

    def _slots(self) -> Iterator[Slot]:
        """Every stage that has a folder."""
        for path in self._folder.glob("*-*"):
            match = _SLOT.fullmatch(path.name)
            if match:
                yield Slot(int(match[1]), match[2], match[3])

    def _path(self, slot: Slot, name: str, kind: str) -> Path:
        """Where something of a task lies."""
        return self._folder / slot.name / f"{name}.{kind}"


def _place(slot: Slot) -> tuple[int, int]:
    """Where a stage comes in a study; one that nobody knows comes first in its round."""
    return slot.round, STAGES.index(slot.stage) if slot.stage in STAGES else -1


def _short(reply_to: str) -> str:
    """A receiving key in a file's name."""
    return hashlib.sha256(reply_to.encode()).hexdigest()[:32]


@contextmanager
def _stored(path: Path) -> Iterator[BufferedRandom]:
    """Write a seekable file that is there whole, and safe from a power cut, or not at all."""
    try:
        make_folder(path.parent, mode=0o700)
        with whole(path) as file:
            yield file
    except OSError as error:
        raise StorageError(f"an answer cannot be stored: {error.strerror}; make room") from error
