"""What a running study tells whoever watches it: a terminal, a dashboard, a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedseg.result import SiteAnswer, SiteFailure, StageRecord
from fedseg.updates import StageName


@dataclass(frozen=True)
class StageOpened:
    """A stage's task goes out to this many nodes."""

    round: int
    stage: StageName
    attempt: int
    nodes: int


@dataclass(frozen=True)
class SiteAnswered:
    """An answer was accepted and folded."""

    round: int
    stage: StageName
    answer: SiteAnswer


@dataclass(frozen=True)
class SiteFailed:
    """A site gave no answer that counts; the study goes on if enough others do."""

    round: int
    stage: StageName
    failure: SiteFailure


@dataclass(frozen=True)
class StageClosed:
    """A stage is over and the study's state is stored. `wall_s`: seconds since it was opened."""

    record: StageRecord
    wall_s: float


Event = StageOpened | SiteAnswered | SiteFailed | StageClosed
Observer = Callable[[Event], None]


def nobody(_event: Event) -> None:
    """The observer that does not look."""
