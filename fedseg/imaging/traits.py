"""What the table of a data folder says of a patient besides the study: scanner, sex, age.

These columns are optional, play no part in training, and never leave the hospital.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedseg.imaging.cases import Case
from fedseg.imaging.listings import inside
from fedseg.imaging.tables import TRAITS, read_table

Traits = Mapping[str, Mapping[str, Sequence[str]]]


def read_traits(folder: Path, cases: Iterable[Case], table: str | None = None) -> Traits:
    """Column -> patient -> the cells of the patient's rows.

    Args:
        folder: as in `read_manifest`; one without a table has no traits.
        cases: of whom to look for what.
        table: a CSV in the folder other than sites.csv.

    Raises:
        DataError: the table cannot be read.
    """
    path = inside(folder, table or "sites.csv")
    if table is None and not path.exists():
        return {}
    columns, records = read_table(path)
    patients = {case.name: case.patient for case in cases}
    found: dict[str, dict[str, list[str]]] = {name: defaultdict(list) for name in TRAITS}
    for record in records:
        patient = patients.get(record.cells["subject"])
        for name in TRAITS:
            if patient is not None and name in columns:
                found[name][patient].append(record.cells.get(name, ""))
    return {name: dict(said) for name, said in found.items() if name in columns}
