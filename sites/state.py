"""What a site remembers from round to round, one file a round; it never leaves.

Round r begins with the newest memory before r, so that a round which is asked again starts where it
started the first time. The last few are kept; the coordinator is never further behind than the
round that is open.

Under a guarantee a round is remembered once its answer is there, and not before: work that a crash
cut short is done again with fresh noise, and what it left would be a second release in whatever
comes next, for which nobody paid.
"""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal

from fedseg.container import packed, unpack
from fedseg.durable import sync_folder, write_atomically
from fedseg.errors import RoundError, StorageError, TrustError
from fedseg.frozen import Frozen
from fedseg.learning.strategies import Memory
from fedseg.plan import StudyPlan

KEPT = 3


class _StateHeader(Frozen):
    """Which study and round a state belongs to."""

    format: Literal["fedseg-site-state/2"] = "fedseg-site-state/2"
    plan: str
    round: int


class Memories:
    """The memories of one study at one site; empty where plan and strategy need none."""

    def __init__(self, folder: Path, plan: StudyPlan) -> None:
        self._folder, self._plan = folder, plan
        self._limit = 16 * 1024 * 1024 + 8 * plan.built.nbytes

    def before(self, round_: int) -> Memory:
        """The newest memory of an earlier round of this plan; an empty one where there is none.

        Raises:
            RoundError: the file is damaged, or of another plan.
        """
        earlier = [found for found in self._stored() if found < round_]
        if not earlier:
            return Memory()
        data = self._path(max(earlier)).read_bytes()
        try:
            header, arrays = unpack(data, _StateHeader, max_bytes=self._limit, schema=None)
        except TrustError as error:
            raise RoundError(f"what the site stored of a round is damaged: {error}") from None
        if header.plan != self._plan.digest:
            raise RoundError(
                "what the site stored of a round is of another plan: give this study a folder of "
                "its own"
            )
        parts: dict[str, dict[str, object]] = {part.name: {} for part in fields(Memory)}
        for key, array in arrays.items():
            part, _, name = key.partition("/")
            if part not in parts:
                raise RoundError(f"what the site stored of a round has an unknown part {part!r}")
            parts[part][name] = array
        return Memory(**parts)  # type: ignore[arg-type]

    def store(self, round_: int, memory: Memory) -> None:
        """Keep the memory after a round; nothing is written where there is none.

        Raises:
            RoundError: the disk is full.
        """
        self._write(self._path(round_), round_, memory)
        self._clear()

    def propose(self, round_: int, answer: str, memory: Memory) -> None:
        """Put aside the memory that goes with an answer, in place of an earlier one; see `accept`.

        Args:
            answer: names the reservation that it is the answer to.

        Raises:
            RoundError: the disk is full.
        """
        path = self._proposed(round_, answer)
        path.unlink(missing_ok=True)
        self._write(path, round_, memory)

    def accept(self, round_: int, answer: str) -> None:
        """Keep what was put aside with an answer that is there now; again, or without: nothing.

        Raises:
            StorageError: the disk fails.
        """
        path = self._proposed(round_, answer)
        try:
            if path.exists():
                path.replace(self._path(round_))
                sync_folder(self._folder)
        except OSError as error:
            raise StorageError(f"a round cannot be remembered: {error.strerror}") from error
        self._clear()

    def _write(self, path: Path, round_: int, memory: Memory) -> None:
        """Write a memory that there is."""
        parts = asdict(memory)
        arrays = {f"{part}/{name}": a for part, some in parts.items() for name, a in some.items()}
        if arrays:
            header = _StateHeader(plan=self._plan.digest, round=round_)
            write_atomically(path, packed(header, arrays), mode=0o600)

    def _clear(self) -> None:
        """Remove what is too old, and what was put aside in rounds that are remembered."""
        stored = sorted(self._stored())
        for old in stored[:-KEPT]:
            self._path(old).unlink(missing_ok=True)
        for kept in stored:
            for path in self._folder.glob(self._proposed(kept, "*").name):
                path.unlink(missing_ok=True)

    def _stored(self) -> list[int]:
        """The rounds whose memory is here."""
        names = [p.name for p in self._folder.glob("round-*.safetensors")]
        found = (re.fullmatch(r"round-(\d{6})\.safetensors", name) for name in names)
        return [int(match[1]) for match in found if match]

    def _path(self, round_: int) -> Path:
        """Where a round's memory lies."""
        return self._folder / f"round-{round_:06d}.safetensors"

    def _proposed(self, round_: int, answer: str) -> Path:
        """Where what is put aside lies."""
        return self._folder / f"round-{round_:06d}-{answer}.proposed"
