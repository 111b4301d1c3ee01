"""The ledger's file: rows that are only ever added, each on disk when its write returns.

SQLite with a rollback journal and `synchronous=EXTRA`: a write has reached the disk when it
returns, the directory entry of the journal included (with FULL alone a power cut may take the last
commit back). No write-ahead log: between writes the one file is the whole ledger, so that a plain
copy of it is a backup.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fedseg.errors import StorageError, TrustError
from fedseg.privacy.ledger.entries import Row, opened_row

_PATIENCE_S = 30.0
MODE = 0o600
_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    n INTEGER PRIMARY KEY, at TEXT NOT NULL, event TEXT NOT NULL,
    prev TEXT NOT NULL, hash TEXT NOT NULL UNIQUE
) STRICT;
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON rows
BEGIN SELECT RAISE(ABORT, 'rows of the ledger are never changed'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON rows
BEGIN SELECT RAISE(ABORT, 'rows of the ledger are never removed'); END;
"""


def read_rows(found: Iterator[tuple[object, ...]], number: int, head: str) -> Iterator[Row]:
    """Rows as they come from the file, each verified against the one before.

    Raises:
        TrustError: one was edited, removed or reordered.
    """
    for n, at, text, prev, digest in found:
        number += 1
        if n != number:
            raise TrustError(f"row {number} of the ledger is missing: rows were removed")
        row = opened_row(number, str(at), str(text), str(prev), str(digest), head)
        head = row.hash
        yield row


def insert(database: sqlite3.Connection, row: Row) -> None:
    """Write one row."""
    values = (row.n, row.at, row.text, row.prev, row.hash)
    database.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", values)


@contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for one operation; whatever goes wrong, what was begun is undone."""
    if not path.exists():
        raise TrustError(
            "the ledger is missing, and without it nobody knows what was spent: bring it back "
            "with `fedseg-site ledger restore`"
        )
    try:
        with closing(connect(path)) as database:
            yield database
    except sqlite3.DatabaseError as error:
        if "malformed" in str(error) or "not a database" in str(error):
            raise TrustError(
                "the ledger's file is damaged: `fedseg-site ledger restore` with a backup"
            ) from None
        raise StorageError(
            f"the ledger cannot be read or written ({error}): nothing goes on unrecorded"
        ) from error


def connect(path: Path) -> sqlite3.Connection:
    """Open the file as every part of fedseg must."""
    database = sqlite3.connect(path, timeout=_PATIENCE_S, isolation_level=None)
    database.execute("PRAGMA journal_mode=DELETE")
    database.execute("PRAGMA synchronous=EXTRA")
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name='no_delete'").fetchone():
        database.executescript(_SCHEMA)
    return database
