"""What a running study tells whoever watches it: a terminal, a dashboard, a log, the audit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedseg.result import SiteAnswer, SiteFailure, StageRecord
from fedseg.updates import StageName


@dataclass(frozen=True)
class StageOpened:
    """A stage's task is stored and goes out to this many nodes.

    Attributes:
        digest: of the task, as answers name it.
        size: bytes of the task as each site is sent it.
        owner: whose own model is measured; None where it is none's. So it is in every event.
    """

    round: int
    stage: StageName
    attempt: int
    nodes: int
    digest: str = ""
    size: int = 0
    owner: str | None = None


@dataclass(frozen=True)
class SiteAnswered:
    """An answer was accepted and folded. `digest`: SHA-256 of the bytes as they came."""

    round: int
    stage: StageName
    answer: SiteAnswer
    digest: str = ""
    owner: str | None = None


@dataclass(frozen=True)
class SiteFailed:
    """A site gave no answer that counts; the study goes on if enough others do."""

    round: int
    stage: StageName
    failure: SiteFailure
    owner: str | None = None


@dataclass(frozen=True)
class StageClosed:
    """A stage is over and the study's state is stored. `wall_s`: seconds since it was opened."""

    record: StageRecord
    wall_s: float


@dataclass(frozen=True)
class Paused:
    """No stage is opened until the study is resumed."""


@dataclass(frozen=True)
class Resumed:
    """The study goes on."""


Event = StageOpened | SiteAnswered | SiteFailed | StageClosed | Paused | Resumed
Observer = Callable[[Event], None]


def nobody(_event: Event) -> None:
    """The observer that does not look."""
