"""One site's usable cohort, taken from a data folder and frozen when a plan is approved.

The cases are those that a simulation on the same folder would train on, to the last one. What is
kept names cases and a digest over their patients, splits, label map and every byte of their files:
data that changed since the approval, or a patient who was taken out of the table, stop the study
until somebody approves again. Cases that were added play no part until then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedseg.errors import DataError
from fedseg.imaging.cases import SPLITS, Cohort, Manifest
from fedseg.imaging.fingerprint import fingerprint
from fedseg.imaging.manifests import ListedManifest, read_manifest
from fedseg.plan import StudyPlan
from fedseg.updates import SplitName
from sites.approval import CohortRecord, frozen_record
from sites.folder import SiteFolder

if TYPE_CHECKING:
    from fedseg.imaging.quality import Inspection

Progress = Callable[[int], AbstractContextManager[Callable[[str], None]]]
AGAIN = "look at it with `fedseg-site check`, then `fedseg-site plan approve` again"


@dataclass(frozen=True)
class Chosen:
    """A cohort that was just looked at.

    Attributes:
        record: what is kept of it.
        inspection: what the check found in the whole folder.
        left_out_patients: this site's patients of whom no case can be used.
    """

    cohort: Cohort
    record: CohortRecord
    inspection: Inspection
    left_out_patients: int


def choose_cohort(
    site: str,
    plan: StudyPlan,
    data: Path,
    *,
    table: str | None = None,
    row: str | None = None,
    to_train: bool = True,
    progress: Progress = lambda _cases: nullcontext(lambda _name: None),
) -> Chosen:
    """Inspect a data folder and take this site's usable cases.

    Args:
        site: the name under which the site is enrolled; every random number of its training
            depends on it.
        table: a CSV in the folder other than sites.csv.
        row: what the data call this site, where it is not `site` and they name several.
        to_train: refuse data without a patient to train on.
        progress: told how many cases will be inspected; what it gives is told of each.

    Raises:
        DataError: the folder cannot be read, names other sites only, or leaves nothing to train on.
    """
    from fedseg.imaging.cohorts import usable_cohorts

    manifest = read_manifest(data, plan.task, table=table, seed=plan.training.seed)
    row = _row_of(manifest, site, row)
    with progress(len(manifest.cases)) as advance:
        cohorts, inspection = usable_cohorts(manifest, plan.task, advance)
    cohort = _named(site, cohorts[row].cohort)
    patients: dict[SplitName, int] = {split: len(cohort.split(split).patients) for split in SPLITS}
    if to_train and not patients["train"]:
        raise DataError(
            "no patient of this site can be trained on: `fedseg-site check` names every case with "
            "its remedy"
        )
    record = CohortRecord(
        plan=plan.digest,
        data=str(data.absolute()),
        table=table,
        row=row,
        cases=tuple(sorted(case.name for case in cohort.cases)),
        patients=patients,
        left_out=cohorts[row].left_out,
        unlisted=_unlisted(manifest),
        fingerprint=_fingerprint(cohort),
        annotated=cohort.annotated,
    )
    whole = manifest.cohort(row).patients
    return Chosen(cohort, record, inspection, len(whole) - len(cohort.patients))


def load_record(folder: SiteFolder, study: str, plan: StudyPlan) -> CohortRecord:
    """The frozen record of an approved plan.

    Raises:
        DataError: nothing is approved, or for another plan.
        TrustError: the approval or the record was edited.
    """
    record = frozen_record(folder, study, plan.digest)
    if record is None:
        raise DataError(
            f"no data are approved for this plan of {study}: `fedseg-site plan show {study}`, then "
            "`plan approve`"
        )
    return record


def load_cohort(folder: SiteFolder, study: str, plan: StudyPlan) -> Cohort:
    """The cohort as it was approved.

    Raises:
        DataError: nothing is approved, or the data changed since the approval.
        TrustError: the approval was edited.
    """
    return recorded_cohort(folder.record.name, plan, load_record(folder, study, plan))


def recorded_cohort(site: str, plan: StudyPlan, record: CohortRecord) -> Cohort:
    """The cohort that a record names, once every byte of it is as it was.

    Raises:
        DataError: the data changed since.
    """
    manifest = read_manifest(
        Path(record.data), plan.task, table=record.table, seed=plan.training.seed
    )
    wanted = frozenset(record.cases)
    cases = tuple(c for c in manifest.cases if c.site == record.row and c.name in wanted)
    gone = len(wanted) - len(cases)
    if gone:
        raise DataError(f"{gone} of the approved cases are no longer in the data folder: {AGAIN}")
    cohort = _named(site, Cohort(record.row, cases, manifest.label_map))
    if _fingerprint(cohort) != record.fingerprint:
        raise DataError(f"the data of {plan.study} changed since they were approved: {AGAIN}")
    return cohort


def _row_of(manifest: Manifest, site: str, row: str | None) -> str:
    """What the data call this site."""
    if row is not None or site in manifest.sites:
        row = site if row is None else row
    elif manifest.sites == ("",):
        row = ""
    if row is None or row not in manifest.sites:
        named = ", ".join(manifest.sites) or "none"
        raise DataError(
            f"the data do not name the site {(row or site)[:80]!r} but: {named[:300]}; say which "
            "of them is this hospital with --row"
        )
    return row


def _named(site: str, cohort: Cohort) -> Cohort:
    """The cohort under the name by which the site is enrolled."""
    cases = tuple(replace(case, site=site) for case in cohort.cases)
    return Cohort(site, cases, cohort.label_map)


def _fingerprint(cohort: Cohort) -> str:
    """Digest of one cohort's table and files."""
    return fingerprint((cohort,))[cohort.site]


def _unlisted(manifest: ListedManifest) -> int:
    """How many cases the folder has that could not even be listed."""
    names = {f.case for f in manifest.findings if f.severity == "error"}
    return len(names - {"", *(case.name for case in manifest.cases)})
