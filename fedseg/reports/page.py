"""A page that is one file: names of the data escaped, pictures inside, times for people."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedseg.reports import findings


def environment(**filters: Callable[..., str]) -> Environment:
    """Templates beside this module, with everything escaped that is not markup of theirs.

    Args:
        filters: besides `date` and, of `fedseg.reports.findings`, `number` and `count`.
    """
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": findings.number, "count": findings.count, "date": date}
    made.filters |= filters
    return made


def data_uri(data: bytes, kind: str) -> str:
    """A picture as a data URI; `kind` is the second half of its media type."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def date(moment: str) -> str:
    """A date with hour, or the text as it is where it is no ISO date."""
    try:
        return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return moment
