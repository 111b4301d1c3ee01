"""One site's usable cohort, taken from a data folder and frozen when a plan is approved.

The cases are those that a simulation on the same folder would train on, to the last one. What is
kept names cases and a digest over their patients, splits, label map and every byte of their files:
data that changed since the approval, or a patient who was taken out of the table, stop the study
until somebody approves again. Cases that were added play no part until then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedseg.errors import DataError
from fedseg.imaging.cases import SPLITS, Cohort, Manifest
from fedseg.imaging.fingerprint import fingerprint
from fedseg.imaging.manifests import ListedManifest, read_manifest
from fedseg.plan import Digest, Frozen, StudyPlan
from fedseg.updates import NotNegativeInt, SplitName
from sites.approval import approved
from sites.folder import SiteFolder, read_note

if TYPE_CHECKING:
    from fedseg.imaging.quality import Inspection

AGAIN = "look at it with `fedseg-site check`, then `fedseg-site plan approve` again"


class CohortRecord(Frozen):
    """cohort.json: which data a study may train on. It names cases and stays with the trainer.

    Attributes:
        data: the data folder, absolute.
        table: the CSV in it, or None for the usual one.
        row: what the data call this site; "" where they name no sites.
        cases: names of the usable cases, sorted.
        patients: patients of them by split.
        left_out: cases of this site that cannot be used.
        unlisted: rows or files of the folder that could not even be listed as cases.
        fingerprint: over patients, splits, label map and files.
    """

    format: Literal["fedseg-cohort/1"] = "fedseg-cohort/1"
    plan: Digest
    data: str
    table: str | None
    row: str
    cases: tuple[str, ...]
    patients: dict[SplitName, NotNegativeInt]
    left_out: NotNegativeInt
    unlisted: NotNegativeInt
    fingerprint: Digest

    @property
    def digest(self) -> str:
        """SHA-256 of the record, which the approval names."""
        return hashlib.sha256(self.canonical_bytes).hexdigest()


@dataclass(frozen=True)
class Chosen:
    """A cohort that was just looked at, its record, and what the check found in the folder."""

    cohort: Cohort
    record: CohortRecord
    inspection: Inspection


def choose_cohort(
    site: str,
    plan: StudyPlan,
    data: Path,
    *,
    table: str | None = None,
    row: str | None = None,
    progress: Callable[[str], None] | None = None,
    listed: Callable[[int], None] = lambda _cases: None,
) -> Chosen:
    """Inspect a data folder and take this site's usable cases.

    Args:
        site: the name under which the site is enrolled; every random number of its training
            depends on it.
        table: a CSV in the folder other than sites.csv.
        row: what the data call this site, where it is not `site` and they name several.
        progress: called with the name of each case once it is inspected.
        listed: told how many cases there are before they are inspected.

    Raises:
        DataError: the folder cannot be read, names other sites only, or leaves nothing to train on.
    """
    from fedseg.imaging.cohorts import usable_cohorts

    manifest = read_manifest(data, plan.task, table=table, seed=plan.training.seed)
    row = _row_of(manifest, site, row)
    listed(len(manifest.cases))
    cohorts, inspection = usable_cohorts(manifest, plan.task, progress)
    cohort = _named(site, cohorts[row].cohort)
    patients: dict[SplitName, int] = {split: len(cohort.split(split).patients) for split in SPLITS}
    if not patients["train"]:
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
    )
    return Chosen(cohort, record, inspection)


def load_record(folder: SiteFolder, study: str, plan: StudyPlan) -> CohortRecord:
    """The frozen record of an approved plan.

    Raises:
        DataError: nothing is approved, or for another plan.
        TrustError: the approval or the record was edited.
    """
    approval = approved(folder, study)
    if approval is None or approval.plan != plan.digest:
        raise DataError(
            f"no data are approved for this plan of {study}: `fedseg-site plan show {study}`, then "
            "`plan approve`"
        )
    record = read_note(folder.cohort(study), CohortRecord)
    if record.digest != approval.cohort or record.plan != plan.digest:
        raise DataError(f"cohort.json of {study} is not the one that was approved: {AGAIN}")
    return record


def load_cohort(folder: SiteFolder, study: str, plan: StudyPlan) -> Cohort:
    """The cohort as it was approved.

    Raises:
        DataError: nothing is approved, or the data changed since the approval.
        TrustError: the approval was edited.
    """
    record = load_record(folder, study, plan)
    manifest = read_manifest(
        Path(record.data), plan.task, table=record.table, seed=plan.training.seed
    )
    wanted = frozenset(record.cases)
    cases = tuple(c for c in manifest.cases if c.site == record.row and c.name in wanted)
    gone = len(wanted) - len(cases)
    if gone:
        raise DataError(f"{gone} of the approved cases are no longer in the data folder: {AGAIN}")
    cohort = _named(folder.record.name, Cohort(record.row, cases, manifest.label_map))
    if _fingerprint(cohort) != record.fingerprint:
        raise DataError(f"the data of {study} changed since they were approved: {AGAIN}")
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
