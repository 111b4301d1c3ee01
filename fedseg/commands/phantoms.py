"""`fedseg phantoms`: hospitals made of phantoms, to try everything without data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

EPILOG = "Example:  fedseg phantoms demo-data --sites 5 --modality MR"


def write(
    folder: Annotated[Path, typer.Argument(help="A new folder for images, labels and sites.csv.")],
    sites: Annotated[int, typer.Option(min=1, max=26, help="How many hospitals.")] = 5,
    patients: Annotated[int, typer.Option(min=3, help="About how many at each.")] = 8,
    modality: Annotated[Literal["MR", "CT"], typer.Option(help="MR or CT.")] = "MR",
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other patients.")] = 0,
) -> None:
    """Write phantoms of several hospitals as ordinary NIfTI files with a table."""
    from fedseg.errors import DataError
    from fedseg.imaging.phantoms import write_phantoms

    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: name a new folder")
    write_phantoms(folder, sites=sites, patients_per_site=patients, modality=modality, seed=seed)
    typer.echo(f"wrote {folder}; look at it with: fedseg-site check {folder}")
