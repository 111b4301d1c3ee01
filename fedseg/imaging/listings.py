"""What a data folder lists: rows, findings, and the words that every layout says them with.

A row says what the files say and nothing more; consistency between rows is `manifests`' work.
Every path must stay inside the folder, links included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedseg.imaging.findings import CaseError, Finding

ENDINGS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Row:
    """One case as the folder lists it; None where it does not say."""

    name: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str | None = None
    site: str | None = None
    split: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Listing:
    """What a folder lists.

    Attributes:
        rows: cases whose image exists.
        findings: rows that were refused, files that no row names, and what the layout lacks.
        label_names: name -> value from a dataset.json.
        orphans: labels without an image, by name.
    """

    rows: tuple[Row, ...]
    findings: tuple[Finding, ...] = ()
    label_names: Mapping[str, int] | None = None
    orphans: tuple[tuple[str, Path], ...] = ()


def inside(folder: Path, text: str, where: str = "") -> Path:
    """The path that a table names, once it is known to stay in the folder.

    Raises:
        DataError: absolute, climbing with .., or leaving through a link.
    """
    prefix = f"{where}: " if where else ""
    pure = PurePosixPath(text.replace("\\", "/"))
    climbs = pure.is_absolute() or ".." in pure.parts or "\x00" in text or ":" in text[1:2]
    if climbs or not (folder / pure).resolve().is_relative_to(folder.resolve()):
        raise CaseError(
            "path-outside",
            f"{prefix}a path leaves the data folder",
            "name files inside the folder, without .. and without links that lead out",
        )
    return folder / pure


def stem_of(filename: str) -> str:
    """A file's name without .nii or .nii.gz."""
    for ending in ENDINGS:
        if filename.endswith(ending):
            return filename[: -len(ending)]
    return filename


def stems_in(folder: Path, places: Sequence[str]) -> dict[str, Path]:
    """Name -> file of everything in these sub-folders, hidden files left out."""
    found: dict[str, Path] = {}
    for place in places:
        if (folder / place).is_dir():
            for path in sorted((folder / place).iterdir()):
                if not path.name.startswith(".") and (
                    path.is_dir() or path.name.endswith((*ENDINGS, ".dcm"))
                ):
                    found.setdefault(stem_of(path.name).removesuffix(".dcm"), path)
    return found


def must_exist(path: Path, text: str, where: str) -> None:
    """Refuse a row whose image is not there."""
    if not path.exists():
        raise no_image(text, where)


def no_image(path: str, where: str) -> CaseError:
    """The image of a case is missing."""
    prefix = f"{where}: " if where else ""
    return CaseError(
        "image-missing", f"{prefix}there is no image {path}", "supply the image, or drop the case"
    )


def label_missing(row: Row, expected: str) -> Finding:
    """The label of a case is missing."""
    shown = expected or f"labels/{row.name}.nii.gz"
    return Finding(
        row.name,
        "error",
        "label-missing",
        f"the image has no label: expected {shown}",
        "supply the label, or drop the case; it is not trained on",
    )


def no_table(folder: Path, taken: str = "each case was taken as its own patient") -> Finding:
    """The folder does not say who the patients are."""
    others = sorted(p.name for p in folder.glob("*.csv"))
    hint = f", or name {others[0]} with --table" if others else ""
    return Finding(
        "",
        "warning",
        "no-table",
        f"there is no sites.csv that says which patient each case belongs to: {taken}",
        f"write sites.csv with the columns subject,site,split,patient{hint}",
    )


def relative(folder: Path, path: Path) -> str:
    """A path inside the folder as text; the folder itself by its name."""
    text = path.relative_to(folder).as_posix()
    return folder.resolve().name if text == "." else text
