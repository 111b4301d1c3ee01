"""A site's small JSON files: read in bounds and checked, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedseg.durable import write_atomically
from fedseg.errors import DataError
from sites.rights import as_owner_of

MAX_NOTE_BYTES = 16 * 1024 * 1024
PUBLIC_FILE, PRIVATE_FILE = 0o644, 0o600
Note = TypeVar("Note", bound=BaseModel)


def read_note(path: Path, kind: type[Note]) -> Note:
    """Read one of our JSON files.

    Raises:
        DataError: it is missing, cannot be read, or is not what this version writes.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_NOTE_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror}") from None
    if len(data) > MAX_NOTE_BYTES:
        raise DataError(f"{path.name} is larger than {MAX_NOTE_BYTES} bytes: it is not fedseg's")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"])) or "whole"
        raise DataError(
            f"{path.name} is damaged or of another version of fedseg ({field}): bring it back from "
            "a backup"
        ) from None


def write_note(path: Path, note: BaseModel | bytes, mode: int = PRIVATE_FILE) -> None:
    """Write a file whole or not at all, for the owner of its folder.

    Raises:
        StorageError: it could not be written; the one before it is untouched.
    """
    data = note if isinstance(note, bytes) else note.model_dump_json(indent=1).encode() + b"\n"
    with as_owner_of(path.parent):
        write_atomically(path, data, mode)
