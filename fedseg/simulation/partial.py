"""Hospitals that do not annotate everything, made from ones that do.

A label that is withheld from a hospital is background in its training and in the metrics of its
rounds, and declared as not annotated. The cohorts that were read stay as they are: with them the
models are measured, on everything that is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedseg.errors import PlanError
from fedseg.imaging.cases import Cohort
from fedseg.task import Task


def parse_without(text: str) -> tuple[str, str]:
    """SITE:LABEL as a pair; the site's name ends at the last colon.

    Raises:
        PlanError: not of that form.
    """
    site, colon, label = text.rpartition(":")
    if not (site and colon and label):
        raise PlanError(f"--without takes SITE:LABEL, for example hospital_b:tumour, not {text!r}")
    return site, label


def withheld(
    cohorts: Sequence[Cohort], task: Task, without: Iterable[tuple[str, str]]
) -> tuple[Cohort, ...]:
    """The cohorts, less the labels that are withheld from them.

    Raises:
        PlanError: a site or a label that is not there, or a site that is left without any label.
    """
    lost: dict[str, set[str]] = {}
    for site, label in without:
        lost.setdefault(site, set()).add(label)
    for what, named, known in (
        ("sites", set(lost), [cohort.site for cohort in cohorts]),
        ("labels", set().union(*lost.values()), list(task.labels)),
    ):
        strange = sorted(named - set(known))
        if strange:
            raise PlanError(
                f"--without names {strange[0]!r}, but the study's {what} are {', '.join(known)}"
            )
    return tuple(_less(c, lost[c.site], task) if c.site in lost else c for c in cohorts)


def _less(cohort: Cohort, lost: set[str], task: Task) -> Cohort:
    """One cohort less some of its labels."""
    own = task.labels if cohort.annotated is None else cohort.annotated
    left = [name for name in sorted(own, key=task.labels.__getitem__) if name not in lost]
    if not left:
        raise PlanError(
            f"--without leaves {cohort.site} no label: a hospital that annotates none has nothing "
            "to train on"
        )
    return cohort.annotated_with(left)
