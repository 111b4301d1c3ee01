"""How a data folder lists its cases: each way of arranging files becomes the same rows.

Known are a CSV (NIfTI or DICOM), Medical Segmentation Decathlon and nnU-Net raw `dataset.json`,
a plain folder with images/ and labels/, and a folder of DICOM files. A row says what the files
say and nothing more; consistency between rows is `manifests`' work. Every path must stay inside
the folder, links included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fedseg.errors import DataError
from fedseg.imaging import tables
from fedseg.imaging.findings import CaseError, Finding
from fedseg.plan import Task

ENDINGS = (".nii.gz", ".nii")
IMAGE_FOLDERS = ("images", "imagesTr")
LABEL_FOLDERS = ("labels", "labelsTr")
MAX_JSON_BYTES = 64 * 1024 * 1024


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
        data = _json(folder / "dataset.json")
        return (
            list_decathlon(folder, task, data)
            if "training" in data
            else list_nnunet(folder, task, data)
        )
    if any((folder / name).is_dir() for name in (*IMAGE_FOLDERS, *LABEL_FOLDERS)):
        return list_plain(folder, task)
    listing = list_dicom(folder)
    if listing.rows or listing.findings:
        return listing
    raise DataError(
        "the folder holds no cases: expected sites.csv, dataset.json, images/ and labels/, or "
        "DICOM files"
    )


def list_table(folder: Path, task: Task, path: Path) -> Listing:
    """Cases by a CSV with the columns subject, site, split, patient and perhaps image, label."""
    columns, records = tables.read_table(path)
    rows, findings, orphans = [], [], []
    for record in records:
        where = f"{path.name}, row {record.row}"
        name = record.cells["subject"]
        try:
            row = _table_row(folder, task, columns, record, where)
        except CaseError as error:
            findings.append(error.of(name))
            if error.code == "image-missing" and (label := _by_name(folder, LABEL_FOLDERS, name)):
                orphans.append((name, label))
        else:
            rows.append(row)
            if row.label is None and row.split != "test":
                findings.append(_label_missing(row, record.cells.get("label", "")))
    named = {r.name for r in rows} | {r.cells["subject"] for r in records}
    if "image" not in columns:
        findings += _strays(folder, named)
    return Listing(tuple(rows), tuple(findings), None, tuple(orphans))


def list_plain(folder: Path, task: Task) -> Listing:
    """Cases of images/ and labels/ alone; who the patients are is not known."""
    images, labels = _stems(folder, IMAGE_FOLDERS), _stems(folder, LABEL_FOLDERS)
    names = {_subject(stem, len(task.channels), images) for stem in images} | set(labels)
    findings = [_no_table(folder)]
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
            findings.append(_label_missing(row, ""))
    return Listing(tuple(rows), tuple(findings), None, tuple(orphans))


def list_decathlon(folder: Path, task: Task, data: Mapping[str, Any]) -> Listing:
    """Cases of a Medical Segmentation Decathlon dataset.json (Antonelli et al. 2022).

    Its `test` images have no labels and are left out.
    """
    entries = data["training"]
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("image"), str) and isinstance(e.get("label"), str)
        for e in entries
    ):
        raise DataError("dataset.json: training must be a list of {image, label} paths")
    order = _channel_order(data.get("modality"), task)
    if order != tuple(range(len(task.channels))):
        raise DataError(
            "dataset.json stacks the channels in another order than the plan: order the plan's "
            "channels like the dataset's"
        )
    rows, findings = [], [_no_table(folder)]
    for number, entry in enumerate(entries, start=1):
        name = stem_of(PurePosixPath(entry["image"]).name)
        where = f"dataset.json, training entry {number}"
        try:
            image, label = (inside(folder, entry[key], where) for key in ("image", "label"))
            _must_exist(image, entry["image"], where)
            row = Row(name, (image,), label if label.exists() else None, where=where)
        except CaseError as error:
            findings.append(error.of(name))
            continue
        rows.append(row)
        if row.label is None:
            findings.append(_label_missing(row, entry["label"]))
    return Listing(tuple(rows), tuple(findings), _label_names(data))


def list_nnunet(folder: Path, task: Task, data: Mapping[str, Any]) -> Listing:
    """Cases of an nnU-Net raw folder: imagesTr/CASE_0000, ..., labelsTr/CASE."""
    ending = data.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        raise DataError(f"dataset.json: file_ending {ending!r} is not read; convert to .nii.gz")
    order = _channel_order(data.get("channel_names", data.get("modality")), task)
    stems = _stems(folder, ("imagesTr",))
    names = sorted({stem[:-5] for stem in stems if stem[-5:-4] == "_" and stem[-4:].isdigit()})
    labels = _stems(folder, ("labelsTr",))
    rows, findings, orphans = [], [_no_table(folder)], []
    for name in names:
        lost = [i for i in order if f"{name}_{i:04d}" not in stems]
        if lost:
            findings.append(_no_image(f"imagesTr/{name}_{lost[0]:04d}{ending}", "").of(name))
            continue
        images = tuple(stems[f"{name}_{i:04d}"] for i in order)
        rows.append(Row(name, images, labels.get(name), where=f"imagesTr/{name}"))
        if name not in labels:
            findings.append(_label_missing(rows[-1], f"labelsTr/{name}{ending}"))
    for name in sorted(set(labels) - set(names)):
        findings.append(_no_image(f"imagesTr/{name}_0000{ending}", "").of(name))
        orphans.append((name, labels[name]))
    return Listing(tuple(rows), tuple(findings), _label_names(data), tuple(orphans))


def list_dicom(folder: Path) -> Listing:
    """One case for every folder that holds DICOM images; segmentations by their references."""
    from fedseg.imaging import dicom

    images: dict[Path, list[Any]] = {}
    others: list[tuple[Path, Any]] = []
    findings: list[Finding] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        try:
            header = dicom.read_header(path)
        except (CaseError, OSError) as error:
            if isinstance(error, CaseError):
                findings.append(error.of(_relative(folder, path.parent)))
            continue
        if header is None:
            continue
        if header.get("Modality") in dicom.NOT_IMAGES:
            others.append((path, header))
        else:
            images.setdefault(path.parent, []).append(header)
    rows = []
    for place, headers in images.items():
        name = _relative(folder, place)
        label, found = _dicom_label(name, headers, others)
        findings += found
        patient = str(headers[0].get("PatientID", "") or "") or None
        rows.append(Row(name, (place,), label, patient, where=f"the series {name}"))
    if rows:
        findings.append(_no_table(folder, "each series was taken as a case of its PatientID"))
    return Listing(tuple(rows), tuple(findings))


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
            _must_exist(path, part, where)
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
    if all(several):
        return tuple(path for path in several if path is not None)
    if any(several):
        lost = several.index(None)
        raise _no_image(f"{_first(folder, IMAGE_FOLDERS)}/{name}_{lost:04d}.nii.gz", where)
    one = _by_name(folder, IMAGE_FOLDERS, name)
    if one is None:
        raise _no_image(f"{_first(folder, IMAGE_FOLDERS)}/{name}.nii.gz", where)
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
            + ", ".join(_relative(folder, p) for p in found),
            "keep one",
        )
    if found:
        inside(folder, str(found[0].relative_to(folder)))
    return found[0] if found else None


def _stems(folder: Path, places: Sequence[str]) -> dict[str, Path]:
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


def _subject(stem: str, channels: int, stems: Mapping[str, Path]) -> str:
    """The subject of an image file: its name without the channel number, if it has one."""
    numbered = len(stem) > 5 and stem[-5] == "_" and stem[-4:].isdigit()
    return stem[:-5] if numbered and (channels > 1 or f"{stem[:-5]}_0000" in stems) else stem


def _strays(folder: Path, named: set[str]) -> list[Finding]:
    """Files of images/ and labels/ that no row of the table names."""
    findings = []
    for places in (IMAGE_FOLDERS, LABEL_FOLDERS):
        stems = _stems(folder, places)
        for stem, path in stems.items():
            if stem not in named and _subject(stem, 2, stems) not in named:
                findings.append(
                    Finding(
                        stem,
                        "warning",
                        "file-unlisted",
                        f"no row of the table names {_relative(folder, path)}",
                        "add a row for it, or move the file away",
                    )
                )
    return findings


def _dicom_label(
    name: str, headers: list[Any], others: list[tuple[Path, Any]]
) -> tuple[Path | None, list[Finding]]:
    """The one segmentation that refers to a series, or why there is none."""
    from fedseg.imaging import dicom

    uids = {str(h.get("SeriesInstanceUID", "") or "") for h in headers} - {""}
    segs = [p for p, h in others if h.get("Modality") == "SEG" and _series_of(h) & uids]
    if len(segs) == 1:
        return segs[0], []
    if len(segs) > 1:
        return None, [
            Finding(
                name,
                "error",
                "label-ambiguous",
                f"{len(segs)} segmentations refer to this series",
                "write sites.csv with the columns subject,site,split,patient,image,label and "
                "name the one that counts",
            )
        ]
    patients = {str(h.get("PatientID", "") or "") for h in headers}
    there = {str(h.get("SOPInstanceUID", "") or "") for h in headers}
    contours = [
        h
        for _, h in others
        if h.get("Modality") == "RTSTRUCT" and str(h.get("PatientID", "")) in patients
    ]
    if contours:
        return None, [dicom.contours_refused(h, there).of(name) for h in contours]
    return None, [_label_missing(Row(name, (), None), "a DICOM SEG that refers to the series")]


def _series_of(header: Any) -> set[str]:
    """Series that a segmentation refers to."""
    items: Iterable[Any] = header.get("ReferencedSeriesSequence", None) or ()
    return {str(item.get("SeriesInstanceUID", "")) for item in items}


def _channel_order(names: Any, task: Task) -> tuple[int, ...]:
    """For each channel of the plan, its number in the dataset.

    Raises:
        DataError: another number of channels.
    """
    given = {int(k): str(v).casefold() for k, v in names.items()} if isinstance(names, dict) else {}
    count = len(task.channels)
    if given and len(given) != count:
        raise DataError(
            f"dataset.json has {len(given)} channel(s) ({', '.join(given.values())}), "
            f"the plan {count}: plan and data must agree"
        )
    by_name = {name: index for index, name in given.items()}
    wanted = [channel.name.casefold() for channel in task.channels]
    if set(by_name) == set(wanted):
        return tuple(by_name[name] for name in wanted)
    return tuple(range(count))


def _label_names(data: Mapping[str, Any]) -> dict[str, int] | None:
    """The labels of a dataset.json as name -> value; None where they are regions or missing."""
    labels = data.get("labels")
    if not isinstance(labels, dict):
        return None
    try:
        if all(str(key).isdigit() for key in labels):
            return {str(name): int(value) for value, name in labels.items()}
        return {str(name): int(value) for name, value in labels.items()}
    except (TypeError, ValueError):
        return None


def _json(path: Path) -> dict[str, Any]:
    """A dataset.json as a mapping."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_JSON_BYTES >> 20} MiB: no dataset")
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise DataError(f"{path.name} is not a JSON object: restore it, or write sites.csv")
    return data


def _must_exist(path: Path, text: str, where: str) -> None:
    """Refuse a row whose image is not there."""
    if not path.exists():
        raise _no_image(text, where)


def _no_image(path: str, where: str) -> CaseError:
    """The image of a case is missing."""
    prefix = f"{where}: " if where else ""
    return CaseError(
        "image-missing", f"{prefix}there is no image {path}", "supply the image, or drop the case"
    )


def _label_missing(row: Row, expected: str) -> Finding:
    """The label of a case is missing."""
    shown = expected or f"labels/{row.name}.nii.gz"
    return Finding(
        row.name,
        "error",
        "label-missing",
        f"the image has no label: expected {shown}",
        "supply the label, or drop the case; it is not trained on",
    )


def _no_table(folder: Path, taken: str = "each case was taken as its own patient") -> Finding:
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


def _first(folder: Path, places: Sequence[str]) -> str:
    """The sub-folder that is there, else the usual one."""
    return next((place for place in places if (folder / place).is_dir()), places[0])


def _relative(folder: Path, path: Path) -> str:
    """A path inside the folder as text; the folder itself by its name."""
    text = path.relative_to(folder).as_posix()
    return folder.resolve().name if text == "." else text
