"""A round's updates on disk, read again a few coordinates of all sites at a time.

Order statistics need every update at once; memory holds a chunk of each. The folder is 0700 and its
files 0600: they are updates in the clear, and lie there until the round is closed. What a crash
leaves is swept away at the next start. A file is there whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.arrays import Arrays
from fedseg.errors import StorageError
from fedseg.schema import TensorSpec

CHUNK = 1 << 16
_ENDING = ".update"
Values = NDArray[np.float64]


class Spill:
    """The updates of one round in a scratch folder.

    Args:
        folder: made anew; whatever lies there is removed.
        schema: the tensors of an update.

    Raises:
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: Path, schema: tuple[TensorSpec, ...]) -> None:
        self._folder, self.schema = folder, schema
        self._places: dict[str, Path] = {}
        sweep(folder)
        try:
            folder.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise _full(folder, error) from error

    @property
    def sites(self) -> tuple[str, ...]:
        """Whose updates are here, by name."""
        return tuple(sorted(self._places))

    def put(self, site: str, update: Arrays) -> None:
        """Write one site's update.

        Raises:
            StorageError: the disk is full; nothing of the update is left.
            ValueError: other names, shapes or types than the schema's, or a site that is here.
        """
        if site in self._places:
            raise ValueError(f"an update of {site} is here already")
        if update.keys() != {spec.name for spec in self.schema}:
            raise ValueError("the update's names are not the schema's")
        for spec in self.schema:
            found = update[spec.name]
            if (found.shape, found.dtype) != (spec.shape, np.dtype(spec.dtype)):
                raise ValueError(f"{spec.name} is {found.dtype}{found.shape}, not as in the schema")
        path = self._folder / f"{len(self._places):05}{_ENDING}"
        draft = path.with_suffix(".part")
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                for spec in self.schema:
                    f.write(np.ascontiguousarray(update[spec.name]).data)
            draft.replace(path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise _full(self._folder, error) from error
        self._places[site] = path

    def chunks(self) -> Iterator[tuple[str, slice, Values]]:
        """Every coordinate once: tensor, its part when flat, and the values, shape (sites, part).

        Rows are in the order of `sites`, so that nothing depends on who answered first.

        Raises:
            StorageError: a file cannot be read, or lacks bytes.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(_opened(self._places[site])) for site in self.sites]
            before = 0
            for spec in self.schema:
                dtype, size = np.dtype(spec.dtype), prod(spec.shape)
                for start in range(0, size, CHUNK):
                    part = slice(start, min(start + CHUNK, size))
                    place = before + start * dtype.itemsize
                    yield spec.name, part, _rows(files, place, part.stop - start, dtype)
                before += size * dtype.itemsize

    def close(self) -> None:
        """Remove the folder."""
        self._places.clear()
        sweep(self._folder)


def sweep(folder: Path) -> None:
    """Remove a scratch folder with the updates in it, if it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(
            f"cannot remove {folder.name}, where updates of hospitals lay: "
            f"{error.strerror}; mend the rights and start again"
        ) from error


def _opened(path: Path) -> BufferedReader:
    """A file to read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise _lost(path, str(error.strerror)) from error


def _rows(files: Sequence[BufferedReader], place: int, count: int, dtype: np.dtype[Any]) -> Values:
    """The same coordinates of every file."""
    rows = np.empty((len(files), count))
    for row, file in zip(rows, files, strict=True):
        try:
            file.seek(place)
            data = file.read(count * dtype.itemsize)
        except OSError as error:
            raise _lost(Path(file.name), str(error.strerror)) from error
        if len(data) != count * dtype.itemsize:
            raise _lost(Path(file.name), "it is cut short")
        row[:] = np.frombuffer(data, dtype)
    return rows


def _full(folder: Path, error: OSError) -> StorageError:
    """The scratch folder takes no more."""
    return StorageError(
        f"cannot keep a site's update in {folder.name} while the round is combined: "
        f"{error.strerror}; nothing of it is left. A robust rule needs room for one update a site: "
        "make room or mend the rights, then start again (a simulation with --resume)"
    )


def _lost(path: Path, why: str) -> StorageError:
    """An update that was written cannot be read back."""
    return StorageError(
        f"cannot read back {path.name}, a site's update of this round: {why}; look after the disk, "
        "then start again (a simulation with --resume): the round is asked for anew"
    )
