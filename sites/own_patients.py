"""Whom a hospital's own models may be trained on: its approved patients, less who withdrew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedseg.errors import DataError
from fedseg.imaging.cases import Cohort
from fedseg.plan import StudyPlan
from sites.approval import CohortRecord, frozen_record
from sites.cohort import Progress, choose_cohort, recorded_cohort
from sites.heldback import House, less_withdrawn


@dataclass(frozen=True)
class Patients:
    """Whom a model may be trained on.

    Attributes:
        cohort: usable cases, all splits.
        fingerprint: of the data.
        withdrawn: patients who were left out because they withdrew.
    """

    cohort: Cohort
    fingerprint: str
    withdrawn: int = 0


def approved_patients(owner: House, plan: StudyPlan) -> Patients:
    """The cohort that was approved with a study's plan, less who withdrew.

    Raises:
        DataError: nothing is approved for this plan here, or the data changed since.
        TrustError: approval or ledger were edited.
    """
    found = frozen_record(owner.folder, plan.study, plan.digest)
    if found is None:
        raise DataError(
            f"no data are approved here for the plan of {plan.study} that this model was trained "
            "by: name the hospital's data with --data DIR"
        )
    return patients_of(owner, plan, found)


def patients_of(owner: House, plan: StudyPlan, record: CohortRecord) -> Patients:
    """The cohort of a frozen record, less who withdrew.

    Raises:
        DataError: the data changed since.
        TrustError: the ledger was edited.
    """
    cohort = recorded_cohort(owner.folder.record.name, plan, record)
    return _without_withdrawn(owner, Patients(cohort, record.fingerprint))


def patients_in(
    data: Path,
    plan: StudyPlan,
    *,
    owner: House | None,
    table: str | None,
    row: str | None,
    progress: Progress,
) -> Patients:
    """The usable cases of a data folder; at a site, less who withdrew.

    Args:
        row: what the data call this site, where they name several.

    Raises:
        DataError: the folder cannot be read, does not fit the plan's task, or leaves nobody.
    """
    name = owner.folder.record.name if owner else row or "here"
    chosen = choose_cohort(name, plan, data, table=table, row=row, progress=progress)
    found = Patients(chosen.cohort, chosen.record.fingerprint)
    return found if owner is None else _without_withdrawn(owner, found)


def _without_withdrawn(owner: House, patients: Patients) -> Patients:
    """The patients less those who withdrew."""
    left = less_withdrawn(owner, patients.cohort)
    gone = len(patients.cohort.patients) - len(left.patients)
    return Patients(left, patients.fingerprint, gone)
