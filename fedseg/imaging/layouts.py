"""How a data folder lists its cases: each way of arranging files becomes the same rows.

Known are a CSV (NIfTI or DICOM), Medical Segmentation Decathlon and nnU-Net raw `dataset.json`,
a plain folder with images/ and labels/, and a folder of DICOM files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedseg.errors import DataError
from fedseg.imaging import tables
from fedseg.imaging.datasets import list_decathlon, list_nnunet, read_dataset_json
from fedseg.imaging.findings import CaseError, Finding
from fedseg.imaging.listings import (
    ENDINGS,
    Listing,
    Row,
    inside,
    label_missing,
    must_exist,
    no_image,
    no_table,
    relative,
    stems_in,
)
from fedseg.task import Task

IMAGE_FOLDERS = ("images", "imagesTr")
LABEL_FOLDERS = ("labels", "labelsTr")


def list_folder(folder: Path, task: Task, table: str | None = None) -> Listing:
    """Recognise the layout of a folder and list its cases.

    Raises:
        DataError: no known layout, or a table or dataset.json that cannot be read.
    """
    if not folder.is_dir():
        raise DataError("the data folder does not exist or is no folder: name the right one")
    if table is not None:
        return list_table(folder, task, inside(folder, table))
    if (folder / "sites.csv").exists():
        return list_table(folder, task, folder / "sites.csv")
    if (folder / "dataset.json").exists():
        data = read_dataset_json(folder / "dataset.json")
        return (
            list_decathlon(folder, task, data)
            if "training" in data
            else list_nnunet(folder, task, data)
        )
    if any((folder / name).is_dir() for name in (*IMAGE_FOLDERS, *LABEL_FOLDERS)):
        return list_plain(folder, task)
    from fedseg.imaging.dicom_folders import list_dicom

    listing = list_dicom(folder)
    if listing.rows or listing.findings:
        return listing
    raise DataError(
        "the folder holds no cases: expected sites.csv, dataset.json, images/ and labels/, or "
        "DICOM files"
    )


def list_table(folder: Path, task: Task, path: Path) -> Listing:
    """Cases by a CSV with the columns subject, site, split, patient and perhaps image, label.

    Without a column image, a subject's files lie in images/ and labels/ under its name, channels
    as SUBJECT_0000, SUBJECT_0001, ... With it, the channels of a case are separated by "|".
    """
    columns, records = tables.read_table(path)
    rows, findings, orphans = [], [], []
    for record in records:
        where = f"{path.name}, row {record.row}"
        name = record.cells["subject"]
        try:
            row = _table_row(folder, task, columns, record, where)
        except (OSError, RuntimeError):
            findings.append(_unusable(name, where))
        except CaseError as error:
            findings.append(error.of(name))
            if error.code == "image-missing" and (label := _by_name(folder, LABEL_FOLDERS, name)):
                orphans.append((name, label))
        else:
            rows.append(row)
            if row.label is None and row.split != "test":
                findings.append(label_missing(row, record.cells.get("label", "")))
    named = {r.name for r in rows} | {r.cells["subject"] for r in records}
    if "image" not in columns:
        findings += _strays(folder, named)
    return Listing(tuple(rows), tuple(findings), None, tuple(orphans))


def list_plain(folder: Path, task: Task) -> Listing:
    """Cases of images/ and labels/ alone; who the patients are is not known."""
    images, labels = stems_in(folder, IMAGE_FOLDERS), stems_in(folder, LABEL_FOLDERS)
    names = {_subject(stem, len(task.channels), images) for stem in images} | set(labels)
    findings = [no_table(folder)]
    rows, orphans = [], []
    for name in sorted(names):
        try:
            paths = _images_of(folder, name, task)
        except CaseError as error:
            findings.append(error.of(name))
            if name in labels:
                orphans.append((name, labels[name]))
            continue
        row = Row(name, paths, labels.get(name), where=f"the image of {name}")
        rows.append(row)
        if row.label is None:
            findings.append(label_missing(row, ""))
    return Listing(tuple(rows), tuple(findings), None, tuple(orphans))


def _table_row(
    folder: Path, task: Task, columns: frozenset[str], record: tables.Record, where: str
) -> Row:
    """One row of a CSV with its files."""
    cells = record.cells
    name = cells["subject"]
    if not record.whole:
        raise CaseError(
            "row-cells", f"{where}: more or fewer cells than the header", "quote cells with commas"
        )
    if not name or any(ord(c) < 32 for c in name):
        raise CaseError("row-subject", f"{where}: the column subject is empty", "name the case")
    if "image" in columns:
        if not cells["image"]:
            raise CaseError("row-image", f"{where}: the column image is empty", "name the image")
        parts = cells["image"].split("|")
        images = tuple(inside(folder, part.strip(), where) for part in parts)
        for path, part in zip(images, parts, strict=True):
            must_exist(path, part, where)
    else:
        inside(folder, name, where)
        if "/" in name or "\\" in name:
            raise CaseError(
                "path-outside", f"{where}: the subject holds a path", "name the file without folder"
            )
        images = _images_of(folder, name, task, where)
    if "label" in columns:
        label = inside(folder, cells["label"], where) if cells["label"] else None
    else:
        label = _by_name(folder, LABEL_FOLDERS, name)
    kept = label if label is not None and label.exists() else None
    known = {key: cells[key] for key in ("patient", "site", "split") if key in columns}
    return Row(name, images, kept, **known, where=where)


def _images_of(folder: Path, name: str, task: Task, where: str = "") -> tuple[Path, ...]:
    """The image files of a subject in images/: one, one a channel, or one folder of DICOM."""
    several = [
        _by_name(folder, IMAGE_FOLDERS, f"{name}_{i:04d}") for i in range(len(task.channels))
    ]
    if any(several) and _by_name(folder, IMAGE_FOLDERS, f"{name}_{len(several):04d}"):
        raise CaseError(
            "channel-count",
            f"the study has {len(several)} channel(s), the case has more files",
            "list the channel to use in a column image, or check with the right plan",
        )
    if all(several):
        return tuple(path for path in several if path is not None)
    if any(several):
        lost = several.index(None)
        raise no_image(f"{_first(folder, IMAGE_FOLDERS)}/{name}_{lost:04d}.nii.gz", where)
    one = _by_name(folder, IMAGE_FOLDERS, name)
    if one is None:
        raise no_image(f"{_first(folder, IMAGE_FOLDERS)}/{name}.nii.gz", where)
    return (one,)


def _by_name(folder: Path, places: Sequence[str], name: str) -> Path | None:
    """The NIfTI file or DICOM of this name; two endings at once are refused."""
    found = [
        path
        for place in places
        for ending in (*ENDINGS, ".dcm", "")
        if (path := folder / place / f"{name}{ending}").exists()
    ]
    if len(found) > 1:
        raise CaseError(
            "file-twice",
            f"there are {len(found)} files for one image or label: "
            + ", ".join(relative(folder, p) for p in found),
            "keep one",
        )
    if found:
        inside(folder, str(found[0].relative_to(folder)))
    return found[0] if found else None


def _subject(stem: str, channels: int, stems: Mapping[str, Path]) -> str:
    """The subject of an image file: its name without the channel number, if it has one."""
    numbered = len(stem) > 5 and stem[-5] == "_" and stem[-4:].isdigit()
    return stem[:-5] if numbered and (channels > 1 or f"{stem[:-5]}_0000" in stems) else stem


def _unusable(name: str, where: str) -> Finding:
    """A path that the file system refuses: too long, a loop of links, no permission."""
    return Finding(
        name,
        "error",
        "path-unusable",
        f"{where}: its files cannot be looked up (name too long, a loop of links, no permission?)",
        "rename the files, or let fedseg read them",
    )


def _strays(folder: Path, named: set[str]) -> list[Finding]:
    """Files of images/ and labels/ that no row of the table names."""
    findings = []
    for places in (IMAGE_FOLDERS, LABEL_FOLDERS):
        stems = stems_in(folder, places)
        for stem, path in stems.items():
            if stem not in named and _subject(stem, 2, stems) not in named:
                findings.append(
                    Finding(
                        stem,
                        "warning",
                        "file-unlisted",
                        f"no row of the table names {relative(folder, path)}",
                        "add a row for it, or move the file away",
                    )
                )
    return findings


def _first(folder: Path, places: Sequence[str]) -> str:
    """The sub-folder that is there, else the usual one."""
    return next((place for place in places if (folder / place).is_dir()), places[0])
