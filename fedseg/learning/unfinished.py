"""What long work has come to so far, in one file that a kill cannot hurt.

The file is of one recipe: of all that the work depends on. It is not taken for another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from fedseg.arrays import Arrays
from fedseg.container import packed, unpack
from fedseg.durable import write_atomically
from fedseg.errors import DataError, TrustError
from fedseg.frozen import Digest, Frozen

MAX_BYTES = 64 * 1024**3
Parts = dict[str, dict[str, NDArray[Any]]]


class Unfinished(Frozen):
    """The header of such a file; each kind of work has one of its own, with a format."""

    recipe: Digest


Kind = TypeVar("Kind", bound=Unfinished)


def recipe_of(*parts: object) -> str:
    """SHA-256 over values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def put_aside(path: Path, header: Unfinished, parts: Mapping[str, Arrays]) -> None:
    """Keep a state in place of the one before, readable by its owner alone.

    Args:
        parts: arrays by part and name.

    Raises:
        StorageError: the file cannot be written; the one before it is untouched.
    """
    arrays = {f"{part}/{name}": a for part, some in parts.items() for name, a in some.items()}
    write_atomically(path, packed(header, arrays), mode=0o600)


def take_up(path: Path, kind: type[Kind], recipe: str, work: str) -> tuple[Kind, Parts] | None:
    """What was put aside of the same recipe, or None where nothing was; empty parts are missing.

    Args:
        work: what it is of, for the message.

    Raises:
        DataError: the file is damaged, or other work was stopped there.
    """
    if not path.exists():
        return None
    try:
        header, arrays = unpack(path.read_bytes(), kind, max_bytes=MAX_BYTES, schema=None)
    except TrustError:
        header, arrays = None, {}
    if header is None or header.recipe != recipe:
        raise DataError(
            f"{path.name} is of another {work}: remove it to begin anew, or write the result "
            "elsewhere"
        )
    parts: Parts = {}
    for key, array in arrays.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = array.copy()
    return header, parts
