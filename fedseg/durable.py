"""Files that are there whole, and safe from a power cut, or not at all.

What is written goes to a draft beside the file and is synced; then the draft takes the file's name
and the folder is synced. A folder that is made is synced into its parent: a file in a folder that a
power cut takes away is not safe. Nothing but Python's library and our errors is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from mmap import mmap
from pathlib import Path

from fedseg.errors import StorageError

Buffer = bytes | bytearray | memoryview | mmap


@contextmanager
def whole(path: Path, mode: int = 0o600) -> Iterator[BufferedRandom]:
    """A file to write, seek and read; it replaces the one before it when the block ends well.

    Args:
        path: the file; its folder must be there.
        mode: of the new file, less the umask.

    Raises:
        OSError: the disk is full or the place cannot be written. The file before it is untouched,
            as it is after any error in the block.
    """
    draft = path.with_name(path.name + ".part")
    try:
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            draft.unlink()


def write_atomically(path: Path, data: bytes | Iterable[Buffer], mode: int = 0o644) -> None:
    """Replace a file in one step: after a crash the old or the new bytes are there, never a part.

    Args:
        data: the bytes, whole or piece by piece.

    Raises:
        StorageError: the disk is full or the place cannot be written; the old file is untouched.
    """
    try:
        make_folder(path.parent)
        with whole(path, mode) as file:
            file.writelines([data] if isinstance(data, bytes) else data)
    except OSError as error:
        raise StorageError(
            f"cannot write {path.name}: {error.strerror}; the file before it is untouched, "
            "make room or mend the rights, then start again (a simulation with --resume)"
        ) from error


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it that are missing; one that is there stays as it is.

    Args:
        mode: of each that is made, less the umask.

    Raises:
        OSError: no right to make it, or a file has its name.
    """
    if path.is_dir():
        return
    make_folder(path.parent, mode)
    path.mkdir(mode=mode, exist_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
