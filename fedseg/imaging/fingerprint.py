"""Which data a study was begun with: a digest for every site, of its table and its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from fedseg.errors import DataError
from fedseg.imaging.cases import Case, Cohort


def fingerprint(cohorts: Iterable[Cohort]) -> dict[str, str]:
    """Site -> SHA-256 over label map, declared labels, patients, splits and bytes of the files.

    Raises:
        DataError: a file cannot be read.
    """
    return {cohort.site: _of_cohort(cohort) for cohort in cohorts}


def _of_cohort(cohort: Cohort) -> str:
    """One site's digest, whatever the order of its cases."""
    hasher = hashlib.sha256(repr(sorted(cohort.label_map)).encode())
    for case in sorted(cohort.cases, key=lambda case: case.name):
        row = (case.name, case.patient, case.split)
        hasher.update(repr(row if case.annotated is None else (*row, case.annotated)).encode())
        for path in _files(case):
            try:
                with path.open("rb") as stream:
                    hasher.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise DataError(f"a file of a case cannot be read: {error.strerror}") from None
    return hasher.hexdigest()


def _files(case: Case) -> list[Path]:
    """Every file of a case; a folder is a DICOM series."""
    listed = [*case.images, *((case.label,) if case.label else ())]
    return [
        file
        for path in listed
        for file in (sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path])
    ]
