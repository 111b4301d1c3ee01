"""From a manifest to the cohorts that can be trained on: each site's cases less the broken ones.

A simulation does this for all sites at once, a hospital for itself when it approves a plan. Cases
are judged beside all others of the folder, because the same image under two patients is an error
of both: the same folder gives the same cohorts to both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedseg.imaging.cases import Cohort, Manifest
from fedseg.imaging.quality import Inspection, inspect, usable
from fedseg.task import Task


@dataclass(frozen=True)
class UsableCohort:
    """The cases of one site that can be used, and how many cannot."""

    cohort: Cohort
    left_out: int


def usable_cohorts(
    manifest: Manifest, task: Task, progress: Callable[[str], None] | None = None
) -> tuple[dict[str, UsableCohort], Inspection]:
    """Inspect every case of a manifest and leave out what cannot be trained on.

    Args:
        progress: called with the name of each case once it is inspected.

    Returns:
        Site -> its usable cohort, sorted by name (an empty one too), and what the inspection found.
    """
    inspection = inspect(manifest, task, progress)
    broken = usable(inspection)
    cohorts = {}
    for site in manifest.sites:
        whole = manifest.cohort(site)
        cohort = whole.without(broken)
        cohorts[site] = UsableCohort(cohort, len(whole.cases) - len(cohort.cases))
    return cohorts, inspection
