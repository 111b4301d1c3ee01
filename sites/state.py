"""What a site remembers from round to round: its optimiser's state, one file a round.

Round r begins with the newest state before r, so that a round which is asked again starts where it
started the first time. The last few states are kept; the coordinator is never further behind than
the round that is open.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from fedseg.arrays import Arrays
from fedseg.container import packed, unpack
from fedseg.durable import write_atomically
from fedseg.errors import RoundError, TrustError
from fedseg.frozen import Frozen
from fedseg.plan import StudyPlan

KEPT = 3


class _StateHeader(Frozen):
    """Which study and round a state belongs to."""

    format: Literal["fedseg-site-state/1"] = "fedseg-site-state/1"
    plan: str
    round: int


class OptimiserStates:
    """The stored states of one study at one site; empty where the plan resets the optimiser."""

    def __init__(self, folder: Path, plan: StudyPlan) -> None:
        self._folder, self._plan = folder, plan
        self._limit = 16 * 1024 * 1024 + 4 * plan.built.nbytes

    def before(self, round_: int) -> dict[str, NDArray[Any]] | None:
        """The newest state of an earlier round of this plan, or None.

        Raises:
            RoundError: the file is damaged, or of another plan.
        """
        earlier = [found for found in self._stored() if found < round_]
        if not earlier:
            return None
        data = self._path(max(earlier)).read_bytes()
        try:
            header, arrays = unpack(data, _StateHeader, max_bytes=self._limit, schema=None)
        except TrustError as error:
            raise RoundError(f"the stored state of the optimiser is damaged: {error}") from None
        if header.plan != self._plan.digest:
            raise RoundError(
                "the stored state of the optimiser is of another plan: give this study a folder of "
                "its own"
            )
        return arrays

    def store(self, round_: int, arrays: Arrays) -> None:
        """Keep the state after a round; nothing is written where there is none.

        Raises:
            RoundError: the disk is full.
        """
        if not arrays:
            return
        header = _StateHeader(plan=self._plan.digest, round=round_)
        write_atomically(self._path(round_), packed(header, arrays), mode=0o600)
        for old in sorted(self._stored())[:-KEPT]:
            self._path(old).unlink(missing_ok=True)

    def _stored(self) -> list[int]:
        """The rounds whose state is here."""
        names = [p.name for p in self._folder.glob("round-*.safetensors")]
        found = (re.fullmatch(r"round-(\d{6})\.safetensors", name) for name in names)
        return [int(match[1]) for match in found if match]

    def _path(self, round_: int) -> Path:
        """Where a round's state lies."""
        return self._folder / f"round-{round_:06d}.safetensors"
