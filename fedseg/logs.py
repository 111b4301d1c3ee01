"""What a daemon says: JSON lines for a journal, plain lines for a person at a terminal.

A line is one JSON object with time (UTC), level, logger and message, and the fields that came with
`extra={"fields": {...}}`. No other text of ours goes to that stream. Tracebacks are one field.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, TextIO

FIELDS = "fields"


def configure(stream: TextIO, level: int = logging.INFO) -> None:
    """Have every logger of this process write to a stream: JSON unless it is a terminal."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_PlainLines() if stream.isatty() else _JsonLines())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)


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
            line |= {str(key): value for key, value in fields.items() if key not in line}
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
