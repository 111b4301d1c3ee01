"""Data of several hospitals, divided into a folder each: what each hospital would bring itself."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from fedseg.errors import DataError

TABLE = "sites.csv"
FOLDERS = ("images", "labels")


def divide(data: Path, out: Path) -> dict[str, Path]:
    """Copy every hospital's rows and files into OUT/SITE; what is there already is kept.

    Args:
        data: images/, labels/ and a sites.csv with the columns subject and site, as
            `fedseg phantoms` writes them.

    Returns:
        Site -> its folder, sorted by name.

    Raises:
        DataError: the folder has no such table.
    """
    try:
        with (data / TABLE).open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise DataError(f"cannot read {TABLE} of the data folder: {error.strerror}") from None
    if not rows or not {"subject", "site"} <= rows[0].keys():
        raise DataError(f"{TABLE} needs the columns subject and site to tell hospitals apart")
    sites = sorted({row["site"] for row in rows})
    return {
        site: _copy(data, out / site, [row for row in rows if row["site"] == site])
        for site in sites
    }


def _copy(data: Path, own: Path, rows: list[dict[str, str]]) -> Path:
    """One hospital's folder; its table is written last, so that a folder with a table is whole."""
    if (own / TABLE).exists():
        return own
    for folder in FOLDERS:
        (own / folder).mkdir(parents=True, exist_ok=True)
        for row in rows:
            for file in (data / folder).glob(f"{row['subject']}.nii*"):
                shutil.copyfile(file, own / folder / file.name)
    draft = own / f"{TABLE}.part"
    with draft.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draft.replace(own / TABLE)
    return own
