"""A patient's cases, each made or loaded when it is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from fedseg.imaging.transforms import PreparedCase


class LazyCases(Sequence[PreparedCase]):
    """Keeps no case: whoever makes them may.

    Args:
        makers: one a case, called each time that it is taken.
    """

    def __init__(self, makers: Sequence[Callable[[], PreparedCase]]) -> None:
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    @overload
    def __getitem__(self, index: int) -> PreparedCase: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PreparedCase]: ...
    def __getitem__(self, index: int | slice) -> PreparedCase | Sequence[PreparedCase]:
        if isinstance(index, slice):
            return LazyCases(self._makers[index])
        return self._makers[index]()
