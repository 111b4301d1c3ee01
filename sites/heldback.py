"""The patients on whom a hospital validates models: held back from every training, labelled, here.

They are those of `test` where the hospital has labelled test patients, else those of `val`. Who
withdrew is left out, and so is whom one of the models was trained on before the data were divided
as they are now. Models whose plans would split these patients differently are not compared:
one of them was trained on patients whom another had held back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedseg.alone import plan_alone
from fedseg.errors import DataError
from fedseg.evaluation.evaluate import labelled
from fedseg.evaluation.validation import Split
from fedseg.imaging.cases import Cohort
from fedseg.imaging.manifests import read_manifest
from fedseg.imaging.traits import Traits, read_traits
from fedseg.modelfile import ModelHeader
from fedseg.plan import StudyPlan
from sites.approval import CohortRecord, frozen_record
from sites.audit import utc_now
from sites.cohort import Progress, choose_cohort, recorded_cohort
from sites.enrolment import pinned_bundle
from sites.folder import SiteFolder
from sites.origins import Origins, trained_on
from sites.rights import as_owner_of

if TYPE_CHECKING:
    from fedseg.security.keys import SigningKey


SEEN = "patients whom the training of one of the models may have seen"


@dataclass(frozen=True)
class House:
    """A hospital with a folder, and the key that signs its audit."""

    folder: SiteFolder
    key: SigningKey


@dataclass(frozen=True)
class Source:
    """Where a hospital's patients are.

    Attributes:
        data: the folder; None takes the one that was approved with the plan.
        table: a CSV in it other than sites.csv.
        row: what the data call this hospital, where they name several.
    """

    data: Path | None
    table: str | None = None
    row: str | None = None


@dataclass(frozen=True)
class HeldBack:
    """Whom to measure on.

    Attributes:
        cohort: labelled cases of one split, of patients who did not withdraw.
        left_out: what was not measured, by reason.
        traits: column -> patient -> cells of the table.
        notes: what is to be said besides.
    """

    cohort: Cohort
    split: Split
    left_out: Mapping[str, int]
    traits: Traits
    notes: tuple[str, ...] = ()


def held_back(
    models: Mapping[str, ModelHeader], source: Source, house: House | None, progress: Progress
) -> HeldBack:
    """The held-back patients of a hospital.

    Args:
        models: name -> header, at least one; the plan of the first says which data are approved.
        house: None for a researcher without a site.

    Raises:
        DataError: nothing is approved, the data changed since, cannot be read, hold nobody back, or
            would be split differently by the plans.
        TrustError: approval or ledger were edited.
    """
    plans, left_out = [header.plan for header in models.values()], dict[str, int]()
    plan = plans[0]
    if source.data is None:
        if house is None:
            raise DataError("name the data: --data DIR, or the site's folder with --site")
        cohort, record = _approved(house, plan)
        source = Source(Path(record.data), record.table, record.row)
    else:
        name = house.folder.record.name if house else source.row or "here"
        chosen = choose_cohort(
            name, plan, source.data, table=source.table, row=source.row, to_train=False,
            progress=progress,
        )  # fmt: skip
        cohort, record = chosen.cohort, chosen.record
        if record.left_out:
            left_out["cases that the check found unusable"] = record.left_out
    assert source.data is not None
    _require_one_split(cohort, plans, source.data, source.table)
    there, origins = cohort, Origins()
    if house is not None:
        cohort = less_withdrawn(house, cohort)
        origins = trained_on(house, models, cohort.patients)
    if gone := len(there.patients) - len(cohort.patients):
        left_out["patients of all splits who withdrew"] = gone
    held = cohort
    cohort = held.without(case.name for case in held.cases if case.patient in origins.seen)
    split: Split = "test" if labelled(cohort.split("test")).cases else "val"
    # Who told a fine-tuning when to stop is of `val`: not missed where `test` is measured.
    asked: tuple[Split, ...] = ("test",) if split == "test" else ("test", "val")
    seen = sum(len(held.split(s).patients) - len(cohort.split(s).patients) for s in asked)
    if seen:
        left_out[SEEN] = seen
    wanted = cohort.split(split)
    measurable = labelled(wanted)
    if bare := len(wanted.cases) - len(measurable.cases):
        left_out[f"cases of {split} without a label"] = bare
    if not measurable.cases:
        raise DataError(
            "no labelled patient is held back: neither test nor val has one"
            + (f" ({seen} {SEEN})" if seen else "")
            + ", so nothing can be validated; hold some back in the column split, never having "
            "trained on them"
        )
    return HeldBack(
        cohort=measurable,
        split=split,
        left_out=left_out,
        traits=read_traits(source.data, measurable.cases, source.table),
        notes=tuple(
            f"{name}: the note of whom it was trained on here is missing from trainer/trained, or "
            "was edited: somebody who is held back now may be among them, and its figures may "
            "flatter it"
            for name in origins.unknown
        ),
    )


def _approved(house: House, plan: StudyPlan) -> tuple[Cohort, CohortRecord]:
    """The data that were approved with a plan."""
    plan = _study_of(house.folder, plan)
    found = frozen_record(house.folder, plan.study, plan.digest)
    if found is None:
        raise DataError(
            f"no data are approved here for the plan of {plan.study} that the first model was "
            "trained by: name the hospital's data with --data DIR"
        )
    return recorded_cohort(house.folder.record.name, plan, found), found


def _study_of(folder: SiteFolder, plan: StudyPlan) -> StudyPlan:
    """The study's plan for that of a hospital alone which follows from it; others as they are."""
    if plan.study in folder.joined:
        pinned = pinned_bundle(folder, plan.study).plan
        if plan_alone(pinned).digest == plan.digest:
            return pinned
    return plan


def _require_one_split(
    cohort: Cohort, plans: Sequence[StudyPlan], data: Path, table: str | None
) -> None:
    """Refuse plans that hold back different patients of these."""
    own = {case.name: case.split for case in cohort.cases}
    for seed in sorted({p.training.seed for p in plans} - {plans[0].training.seed}):
        other = read_manifest(data, plans[0].task, table=table, seed=seed)
        if any(own.get(case.name, case.split) != case.split for case in other.cases):
            raise DataError(
                "the data name no splits, and the models' plans split them by different seeds: "
                "what one held back another was trained on; write the column split as it was for "
                "each, or validate the models one by one"
            )


def less_withdrawn(house: House, cohort: Cohort) -> Cohort:
    """The cohort less those who withdrew; where there never was a ledger, nobody could."""
    from sites.ledger import begun, look_at, without_withdrawn

    with as_owner_of(house.folder.trainer):
        if not begun(house.folder, house.key, utc_now):
            return cohort
        ledger, _ = look_at(house.folder, house.key, utc_now)
        return without_withdrawn(ledger, cohort)
