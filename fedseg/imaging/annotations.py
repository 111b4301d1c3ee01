"""Which of the study's labels a segmentation marks, and what it may then hold.

A hospital that draws only some of the labels declares which (`label_maps`). Of the others its
background says nothing: they are neither taught nor measured there. A label that is drawn without
being declared is an error, because nobody can tell whether it is drawn everywhere; one that is
declared and in no segmentation at all is a warning, because it is then taught as absent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fedseg.imaging.cases import Case
from fedseg.imaging.findings import Finding
from fedseg.task import Task


def only_annotated(label: NDArray[np.uint8], case: Case, task: Task) -> NDArray[np.uint8]:
    """A label map with background wherever it holds a label that its case is not annotated with.

    Args:
        label: uint8, values of the study; it is left as it is.
    """
    if case.annotated is None:
        return label
    kept = np.arange(256, dtype=np.uint8)
    kept[[v for name, v in task.labels.items() if name not in case.annotated]] = 0
    return kept[label]


def drawn(label: NDArray[np.uint8], task: Task) -> frozenset[str]:
    """Names of the labels that occur in a label map of the study's values."""
    there = np.bincount(label.ravel(), minlength=256) > 0
    return frozenset(name for name, value in task.labels.items() if there[value])


def undeclared(case: Case, names: Iterable[str]) -> Iterable[Finding]:
    """The error of a segmentation that holds labels which its hospital does not declare.

    Args:
        names: what is drawn in it.
    """
    if case.annotated is None:
        return
    strange = sorted(set(names) - set(case.annotated))
    if strange:
        yield Finding(
            case.name,
            "error",
            "label-undeclared",
            f"the segmentation holds {', '.join(strange)}, but labels.yaml declares as annotated "
            f"here: {', '.join(case.annotated)}",
            "where it is drawn in every case, add it to `annotated` in labels.yaml; where only "
            "in some, write 'VALUE: background' for its value",
        )


class Declared:
    """What each site declares, against what its segmentations were seen to hold."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = defaultdict(set)
        self._said: dict[str, dict[str, None]] = defaultdict(dict)
        self._cases: dict[str, int] = defaultdict(int)

    def add(self, case: Case, names: Iterable[str]) -> None:
        """Take in one segmentation and what is drawn in it."""
        self._seen[case.site].update(names)
        self._said[case.site].update(dict.fromkeys(case.annotated or ()))
        self._cases[case.site] += 1

    def findings(self) -> list[Finding]:
        """A warning for each label that a site declares and never draws."""
        return [
            Finding(
                "",
                "warning",
                "label-never-seen",
                f"{name} is declared as annotated{f' at {site}' if site else ''}, and none of "
                f"{self._cases[site]} segmentations holds it",
                "see that it is really drawn wherever it is; else take it out of `annotated` in "
                "labels.yaml, so that it is not taught as absent",
            )
            for site, said in sorted(self._said.items())
            for name in said
            if name not in self._seen[site]
        ]
