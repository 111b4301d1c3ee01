"""Scanner, sex and age from the table of a data folder."""

from __future__ import annotations

from pathlib import Path

from fedseg.imaging.cases import Case
from fedseg.imaging.traits import read_traits

CASES = tuple(Case(name, f"P-{name[0]}", "A", "val", (), None) for name in ("a1", "a2", "b1"))


def test_cells_are_found_by_patient_and_columns_that_are_missing_are_not(tmp_path: Path) -> None:
    (tmp_path / "sites.csv").write_text(
        "subject;Scanner;age\na1;Prisma;40\na2;Skyra;\nb1;Prisma;61\nother;X;1\n"
    )
    assert read_traits(tmp_path, CASES) == {
        "scanner": {"P-a": ["Prisma", "Skyra"], "P-b": ["Prisma"]},
        "age": {"P-a": ["40", ""], "P-b": ["61"]},
    }


def test_another_table_and_none(tmp_path: Path) -> None:
    assert read_traits(tmp_path, CASES) == {}
    (tmp_path / "mine.csv").write_text("subject,sex\nb1,f\n")
    assert read_traits(tmp_path, CASES, "mine.csv") == {"sex": {"P-b": ["f"]}}
