"""Patients, their cases, and the manifest that lists them.

A patient has one or more cases (image channels plus a label map on one grid); a case belongs to
one patient. Splits are by patient: no patient stands in two splits or at two sites. A cohort is
the patients of one site. Nothing here opens an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedseg.errors import DataError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Case:
    """One examination: where its channels and its labels lie.

    Attributes:
        name: unique within the manifest; shown only inside the hospital.
        patient: the person; the unit of privacy.
        site: the hospital, or "" where the data name none.
        split: train, val or test.
        images: one path a channel, in the plan's order; a folder is a DICOM series.
        label: the label map (NIfTI, or DICOM SEG), or None where the case has none.
        annotated: names of the study's labels that the label map marks wherever they are, by
            their numbers; None is all of them. Of any other label it says nothing: background may
            hold it. A hospital declares it, for all its cases alike.
    """

    name: str
    patient: str
    site: str
    split: Split
    images: tuple[Path, ...]
    label: Path | None
    annotated: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Manifest:
    """All cases of a data folder, and how their label values read as the study's labels.

    Attributes:
        label_map: value in the files -> value in the plan; empty means they are the same. A value
            that is mapped to 0 becomes background. Where it is given, values that it does not
            name are errors.
    """

    root: Path
    cases: tuple[Case, ...]
    label_map: tuple[tuple[int, int], ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites by name, sorted."""
        return tuple(sorted({case.site for case in self.cases}))

    def cohort(self, site: str) -> Cohort:
        """The patients of one site.

        Raises:
            DataError: no case of that site.
        """
        cases = tuple(case for case in self.cases if case.site == site)
        if not cases:
            raise DataError(
                f"the manifest has no case of site {site!r}; it has: {', '.join(self.sites)}"
            )
        return Cohort(site=site, cases=cases, label_map=self.label_map)


@dataclass(frozen=True)
class Cohort:
    """The cases of one site. Iteration and lengths are over patients, never over slices."""

    site: str
    cases: tuple[Case, ...]
    label_map: tuple[tuple[int, int], ...] = ()

    def split(self, split: Split) -> Cohort:
        """The part of the cohort that is in one split; it may be empty."""
        return self._only(case for case in self.cases if case.split == split)

    def without(self, names: Iterable[str]) -> Cohort:
        """The cohort less the cases of these names."""
        left_out = frozenset(names)
        return self._only(case for case in self.cases if case.name not in left_out)

    @property
    def patients(self) -> tuple[str, ...]:
        """The patients, sorted."""
        return tuple(sorted({case.patient for case in self.cases}))

    @property
    def annotated(self) -> tuple[str, ...] | None:
        """Labels that at least one of its cases is annotated with; None is all of the plan's.

        At a hospital all cases have the same; only patients of several, pooled, differ.
        """
        declared = [case.annotated for case in self.cases]
        if None in declared or not declared:
            return None
        return tuple(dict.fromkeys(name for names in declared for name in names or ()))

    def require_annotated_alike(self) -> None:
        """Refuse cases that are annotated with different labels.

        Raises:
            DataError: they are; a guarantee needs the labels to be the hospital's, not a patient's.
        """
        if len({case.annotated for case in self.cases}) > 1:
            raise DataError(
                "the patients of this site are annotated with different labels: under a privacy "
                "guarantee a hospital declares one list of labels for all its patients"
            )

    def annotated_with(self, labels: Iterable[str]) -> Cohort:
        """The same cases, annotated with these labels alone; what else is drawn is not looked at.

        Args:
            labels: names of the study's, by their numbers.
        """
        names = tuple(labels)
        return self._only(replace(case, annotated=names) for case in self.cases)

    def by_patient(self) -> Iterator[tuple[str, tuple[Case, ...]]]:
        """Each patient with its cases, both sorted by name."""
        for patient in self.patients:
            own = (case for case in self.cases if case.patient == patient)
            yield patient, tuple(sorted(own, key=lambda case: case.name))

    def _only(self, cases: Iterable[Case]) -> Cohort:
        """The same cohort with these cases."""
        return Cohort(self.site, tuple(cases), self.label_map)
