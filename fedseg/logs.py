"""What a daemon says: JSON lines for a journal, plain lines for a person at a terminal.

A line is one JSON object with time (UTC), level, logger and message, and the fields that came with
`extra={"fields": {...}}`. No other text of ours goes to that stream. Tracebacks are one field.
Logs travel further than patients' names may: where an error's own text can name a file of theirs,
`without_its_text` leaves that out.
"""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

FIELDS = "fields"
_LONGEST = 32_000_000
_TALKATIVE = ("httpx", "httpcore", "flwr")  # a line a request


def configure(
    stream: TextIO | None, *, also: Path | None = None, level: int = logging.INFO
) -> None:
    """Have every logger of this process write to a stream: JSON unless it is a terminal.

    Args:
        stream: None writes to the file alone.
        also: a file for the same as JSON; it is cut at 32 MB, one older file is kept.
    """
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    if stream is not None:
        spoken = logging.StreamHandler(stream)
        spoken.setFormatter(_PlainLines() if stream.isatty() else _JsonLines())
        root.addHandler(spoken)
    if also is not None:
        kept = RotatingFileHandler(also, maxBytes=_LONGEST, backupCount=1, encoding="utf-8")
        kept.setFormatter(_JsonLines())
        root.addHandler(kept)
    root.setLevel(level)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def without_its_text(error: BaseException) -> dict[str, Any]:
    """For `extra`: of what kind an error is and through which code it came, not what it says."""
    told: list[str] = []
    link: BaseException | None = error
    while link is not None:
        told += [*traceback.format_tb(link.__traceback__), f"{type(link).__name__}\n"]
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return {FIELDS: {"error": "".join(told)}}


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; text that is not ASCII is escaped, so that a line is a line."""
        line: dict[str, Any] = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, FIELDS, None)
        if isinstance(fields, dict):
            said = {str(key): value for key, value in fields.items() if value is not None}
            line |= {key: value for key, value in said.items() if key not in line}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _PlainLines(logging.Formatter):
    """Time, level where it matters, message, fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line for people."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        fields = getattr(record, FIELDS, None) or {}
        tail = "".join(f"  {key}={value}" for key, value in fields.items() if value is not None)
        text = f"{_utc(record)[11:19]}  {level}{record.getMessage()}{tail}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _utc(record: logging.LogRecord) -> str:
    """When it was said, in UTC with milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
