"""What the trainer writes into the site's audit, so that nobody outside can fill the disk with it.

Every answer that leaves is an entry of its own. Refusals and repeated tasks are caused from
outside, as often as a relay that was taken over likes: the first of an hour are entries of their
own, the others are counted, and the count is the next hour's first entry. What was only counted is
not answered, so that nothing leaves without an entry. Each study and each code is counted for
itself: who sends rubbish by the thousand cannot hide a task of another kind in it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from fedseg.chain import Chain, Fact

SINGLY = 100
HOUR_S = 3600.0
_KIND = ("study", "code")


class Chronicle:
    """A site's audit as the trainer writes it."""

    def __init__(self, chain: Chain, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._chain, self._clock = chain, clock
        self._lock = threading.Lock()
        self._since = clock()
        self._seen: Counter[tuple[str, Fact, Fact]] = Counter()

    def write(self, event: str, **facts: Fact) -> None:
        """Append an entry; it is on disk when this returns."""
        self._chain.append(event, **facts)

    def provoked(self, event: str, **facts: Fact) -> bool:
        """Append an entry that somebody outside caused, or count it where there were many.

        Returns:
            Whether it has an entry of its own: only then may it be answered.
        """
        kind = (event, facts.get("study"), facts.get("code"))
        with self._lock:
            if self._clock() - self._since > HOUR_S:
                self._settle()
            self._seen[kind] += 1
            singly = self._seen[kind] <= SINGLY
        if singly:
            self._chain.append(event, **facts)
        return singly

    def close(self) -> None:
        """Append what was only counted."""
        with self._lock:
            self._settle()

    def _settle(self) -> None:
        """Write the counts of the hour and begin another."""
        for (event, *kind), count in self._seen.items():
            if count > SINGLY:
                facts = {name: fact for name, fact in zip(_KIND, kind, strict=True) if fact}
                more = f"{count - SINGLY} more within one hour"
                self._chain.append(event, **facts, reason=more)
        self._seen.clear()
        self._since = self._clock()
