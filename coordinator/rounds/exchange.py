"""How tasks and answers travel, as the round loop sees it: sealed, or as they are in a simulation.

`coordinator.sealing` has the exchange between hospitals.
"""

from __future__ import annotations

from typing import Protocol

from fedseg.aggregation.rounds import Position
from fedseg.durable import Buffer
from fedseg.security.consent import Consent
from fedseg.security.identity import SignedRoll


class Exchange(Protocol):
    """What stands between the round loop and the network."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Who is enrolled, as of the roll in force; empty where nobody is."""

    def adopt(self) -> SignedRoll | None:
        """Put the roll as it stands in force; the sites are told it when they enlist."""

    def changed(self) -> bool:
        """Whether the roll is another than the one in force: the sites are to enlist again."""

    def revoked(self, site: str) -> bool:
        """Whether a site of the roll in force was taken out since: its answer counts no more."""

    def seal(self, position: Position, task: bytes) -> bytes:
        """What is sent for a task, stored before this returns; the same bytes after a crash."""

    def open(self, data: bytes) -> tuple[str | None, Buffer]:
        """The site that signed an answer (None: nobody signs), and the answer.

        Raises:
            AnswerError: with code `malformed`, `stale`, `site` or `signature`.
        """

    def require_given(self, consent: Consent) -> None:
        """Check that the site which a consent names has given it, and still takes part.

        Raises:
            AnswerError: with code `site` or `signature`.
        """

    def closed(self, position: Position) -> None:
        """The stage is over and the state after it is stored: nothing of it is read any more."""


class Plain:
    """Nothing is hidden, and sites are who they say: for a simulation in one process."""

    sites: tuple[str, ...] = ()

    def adopt(self) -> None:
        """There is no roll."""

    def changed(self) -> bool:
        """There is no roll."""
        return False

    def revoked(self, site: str) -> bool:
        """There is no roll."""
        return False

    def seal(self, position: Position, task: bytes) -> bytes:
        """The task."""
        return task

    def open(self, data: bytes) -> tuple[None, bytes]:
        """The answer, signed by nobody."""
        return None, data

    def require_given(self, consent: Consent) -> None:
        """Nobody signs."""

    def closed(self, position: Position) -> None:
        """Nothing was kept."""
