"""A cohort's prepared cases, loaded when they are asked for and kept in memory up to a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Case, Cohort
from fedseg.imaging.transforms import PreparedCase
from fedseg.learning.lazy import LazyCases

MEMORY_BYTES = 2 * 1024**3


class PreparedPatients(Mapping[str, Sequence[PreparedCase]]):
    """Patient -> prepared cases. The cases used longest ago make room for new ones."""

    def __init__(self, cohort: Cohort, cache: CaseCache, memory_bytes: int = MEMORY_BYTES) -> None:
        self._cases = dict(cohort.by_patient())
        self._label_map = cohort.label_map
        self._cache = cache
        self._room = memory_bytes
        self._loaded: OrderedDict[str, PreparedCase] = OrderedDict()

    def __getitem__(self, patient: str) -> Sequence[PreparedCase]:
        return LazyCases([partial(self.load, case) for case in self._cases[patient]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._cases)

    def __len__(self) -> int:
        return len(self._cases)

    def without(self, patients: Iterable[str]) -> Mapping[str, Sequence[PreparedCase]]:
        """All but these patients."""
        left_out = frozenset(patients)
        return {name: self[name] for name in self if name not in left_out}

    def load(self, case: Case) -> PreparedCase:
        """One prepared case, from memory, the disk cache or the hospital's files."""
        if case.name in self._loaded:
            self._loaded.move_to_end(case.name)
            return self._loaded[case.name]
        prepared = self._cache.load(case, self._label_map)
        self._loaded[case.name] = prepared
        while len(self._loaded) > 1 and sum(map(_size, self._loaded.values())) > self._room:
            self._loaded.popitem(last=False)
        return prepared


def _size(case: PreparedCase) -> int:
    """Bytes of a prepared case."""
    return case.image.nbytes + (0 if case.label is None else case.label.nbytes)
