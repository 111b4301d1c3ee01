"""A CSV of cases, as people write them: read carefully, or refused with the remedy.

Comma, semicolon and tab separate; a byte-order mark and UTF-16 from a spreadsheet are fine. What
is wrong with the whole table is a `DataError`; what is wrong with one row is left to the caller.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedseg.errors import DataError

MAX_TABLE_BYTES = 64 * 1024 * 1024
TRAITS = ("scanner", "sex", "age")
COLUMNS = ("subject", "site", "split", "patient", "image", "label", *TRAITS)
SEPARATORS = (",", ";", "\t")


@dataclass(frozen=True)
class Record:
    """One row: its number in the file (the header is row 1) and its cells by column name.

    Attributes:
        cells: only columns that fedseg knows; "" where the cell is empty.
        whole: the row has as many cells as the header.
    """

    row: int
    cells: Mapping[str, str]
    whole: bool


def read_table(path: Path) -> tuple[frozenset[str], tuple[Record, ...]]:
    """Read a CSV of cases.

    Returns:
        The known columns that it has, and its rows.

    Raises:
        DataError: missing, not text, without a header that names `subject`, or empty.
    """
    name = path.name
    text = _text(path)
    lines = text.splitlines()
    if not any(line.strip() for line in lines):
        raise DataError(f"{name} is empty: expected the columns subject,site,split,patient")
    header = next(line for line in lines if line.strip())
    separator = max(SEPARATORS, key=lambda s: len(_known(header, s)))
    rows = [(n, row) for n, row in _rows(text, separator, name) if any(c.strip() for c in row)]
    columns = [cell.strip().casefold() for cell in rows[0][1]]
    if "subject" not in columns:
        raise DataError(
            f"{name}: the column subject is missing; the header names {_shown(columns)}; expected "
            "subject,site,split,patient (and image,label for DICOM), separated by comma, "
            "semicolon or tab"
        )
    twice = sorted({c for c in columns if c in COLUMNS and columns.count(c) > 1})
    if twice:
        raise DataError(f"{name}: the column {twice[0]} occurs twice; keep one")
    if len(rows) == 1:
        raise DataError(f"{name} has a header and no rows: add one row a case")
    return frozenset(columns) & frozenset(COLUMNS), tuple(
        Record(n, _cells(columns, row), len(row) == len(columns)) for n, row in rows[1:]
    )


def _text(path: Path) -> str:
    """The table's text; binary files are named."""
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_TABLE_BYTES >> 20} MiB: no case list")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the table {path.name} ({error.strerror}): supply it, or name another "
            "with --table"
        ) from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif data.startswith(b"PK\x03\x04") or b"\x00" in data:
        raise DataError(
            f"{path.name} is binary, not a CSV (a spreadsheet file?): save it as CSV, UTF-8"
        )
    else:
        encoding = "utf-8-sig"
    try:
        return data.decode(encoding).lstrip("\ufeff")
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not {encoding} text: save it as CSV, UTF-8") from None


def _rows(text: str, separator: str, name: str) -> list[tuple[int, list[str]]]:
    """Line number and cells of every row."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(
            f"{name}, near line {reader.line_num}: not a CSV ({error}); check the quotes"
        ) from None


def _known(header: str, separator: str) -> set[str]:
    """Which known columns a header names if it is cut at this separator."""
    return {cell.strip().strip('"').casefold() for cell in header.split(separator)} & set(COLUMNS)


def _cells(columns: list[str], row: list[str]) -> dict[str, str]:
    """The known cells of a row by column."""
    cells = zip(columns, [*row, *[""] * len(columns)], strict=False)
    return {column: cell.strip() for column, cell in cells if column in COLUMNS}


def _shown(columns: list[str]) -> str:
    """The header, shortened."""
    return ", ".join(repr(c[:40]) for c in columns[:8]) or "nothing"
