"""status.json: what the daemon says of its processes, to people and to monitoring."""

from __future__ import annotations

from fedseg.frozen import Frozen


class Part(Frozen):
    """How one process does: since when, and how often it was started again."""

    state: str
    since: str | None = None
    restarts: int = 0
    pid: int | None = None


class SiteStatus(Frozen):
    """The daemon and all that it looks after.

    Attributes:
        closed: why no task is taken, or None.
        studies: the relay of each study that has one.
    """

    site: str
    pid: int
    started: str
    written: str
    closed: str | None
    trainer: Part
    studies: dict[str, Part]
