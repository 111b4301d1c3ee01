"""What is on its way: the sealed task of the open stage, and the key that opens its answers.

A task is on disk before it is sent, so that after a crash the same bytes go out again. A stage of a
round has one receiving key through all its attempts; when the stage is closed the key is
overwritten and removed, and with it the last means to read the stage's answers again. (On a disk
that keeps old blocks, such as an SSD, overwriting is a best effort: encrypt the disk.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fedseg.aggregation.rounds import Position
from fedseg.durable import make_folder, sync_folder, whole
from fedseg.errors import StorageError, TrustError
from fedseg.security.envelope import EnvelopeHeader, read_header
from fedseg.security.keys import ReceivingKey, load_receiving_key, save_key

logger = logging.getLogger(__name__)


class Outbox:
    """A folder, 0700, with one key a stage and one task an attempt."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def key(self, position: Position) -> ReceivingKey:
        """The stage's receiving key; the first time it is made, and on disk when this returns.

        One that is damaged, or half destroyed when the machine died, is replaced: sites that have
        answered seal the same answer for the new one.

        Raises:
            StorageError: it could not be written.
        """
        path = self._folder / f"{_stage(position)}.key"
        try:
            return load_receiving_key(path)
        except TrustError as error:
            if path.exists():
                logger.warning("a new receiving key is made for %s: %s", _stage(position), error)
                path.unlink()
        key = ReceivingKey.generate()
        save_key(path, key)
        return key

    def header(self, position: Position, max_bytes: int) -> EnvelopeHeader | None:
        """What the stored task says of itself, or None where there is none that is whole."""
        try:
            with self.task(position).open("rb") as file:
                return read_header(file, max_bytes=max_bytes)
        except (FileNotFoundError, TrustError):
            return None

    def task(self, position: Position) -> Path:
        """Where the sealed task of an attempt lies."""
        return self._folder / f"{_stage(position)}-{position.attempt}.task"

    @contextmanager
    def writing(self, position: Position) -> Iterator[BinaryIO]:
        """A file for the sealed task; it is there, safe from a power cut, when the block ends.

        Raises:
            StorageError: the disk is full or the place cannot be written.
        """
        try:
            make_folder(self._folder, mode=0o700)
            with whole(self.task(position)) as file:
                yield file
        except OSError as error:
            raise StorageError(
                f"the task cannot be stored ({error.strerror}), so it was not sent: make room and "
                "start the coordinator again"
            ) from error

    def destroy(self, position: Position) -> None:
        """Remove the key of a stage and all its tasks; where there is none, nothing is done."""
        self._remove(lambda name: _belongs(name, position))

    def destroy_others(self, position: Position) -> None:
        """Remove what is left of every other stage: a crash came before it was destroyed."""
        self._remove(lambda name: not _belongs(name, position))

    def _remove(self, gone: Callable[[str], bool]) -> None:
        """Overwrite and remove files; a key is overwritten before anything else is done."""
        if not self._folder.is_dir():
            return
        paths = [path for path in sorted(self._folder.iterdir()) if gone(path.name)]
        for path in sorted(paths, key=lambda path: path.suffix in (".task", ".part")):
            if path.suffix not in (".task", ".part"):
                _overwrite(path)
            path.unlink(missing_ok=True)
        if paths:
            sync_folder(self._folder)


def _stage(position: Position) -> str:
    """A stage of a round in a file's name."""
    stage = f"{position.round:06d}-{position.stage}"
    return stage if position.owner is None else f"{stage}+{position.owner}+"


def _belongs(name: str, position: Position) -> bool:
    """Is the file of this stage? Drafts of its key begin with a dot."""
    return name.lstrip(".").startswith((f"{_stage(position)}.", f"{_stage(position)}-"))


def _overwrite(path: Path) -> None:
    """Zeros in place of a key, on the disk and not only in its cache."""
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())
