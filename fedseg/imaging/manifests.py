"""From a data folder to a manifest: every case with its patient, site and split, or why not.

One bad row does not spoil the others: it becomes a finding and its case is left out. A patient
that stands in two splits or at two sites is left out whole, because no choice between them would
be safe. Only a folder that cannot be understood at all is an error.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedseg.errors import DataError
from fedseg.imaging import label_maps, layouts
from fedseg.imaging.cases import SPLITS, Case, Manifest, Split
from fedseg.imaging.findings import CaseError, Finding
from fedseg.imaging.listings import Listing, Row
from fedseg.imaging.partition import assign_sites, assign_splits, parse_partition
from fedseg.task import Task

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class ListedManifest(Manifest):
    """A manifest that remembers what was left out of it.

    Attributes:
        findings: of the rows and files; cases without a label are among the cases, and found here.
        orphans: labels whose image is missing, by name.
    """

    findings: tuple[Finding, ...] = ()
    orphans: tuple[tuple[str, Path], ...] = ()


def read_manifest(
    folder: Path,
    task: Task,
    *,
    table: str | None = None,
    partition: str | None = None,
    sites: int = 5,
    seed: int = 0,
) -> ListedManifest:
    """List the usable rows of a data folder.

    Args:
        folder: NIfTI with a CSV, a Decathlon or nnU-Net dataset.json, images/ and labels/ alone,
            or DICOM; see `layouts`.
        task: the study's channels and labels.
        table: a CSV in the folder other than sites.csv.
        partition: "iid" or "dirichlet:ALPHA" to deal patients out to `sites` sites; replaces the
            sites that the data name.
        sites: how many sites the partition makes.
        seed: of the partition, and of the split where the data name none; that split is the same
            for the same patients, whatever their sites.

    Raises:
        DataError: nothing usable; the message names what is wrong and the remedy.
    """
    manifest = survey(folder, task, table=table, partition=partition, sites=sites, seed=seed)
    if not manifest.cases:
        codes = Counter(f.code for f in manifest.findings if f.severity == "error")
        shown = ", ".join(f"{n} x {code}" for code, n in sorted(codes.items())) or "no rows"
        raise DataError(
            f"no case of the folder can be used ({shown}): `fedseg-site check` names each with "
            "its remedy"
        )
    return manifest


def survey(
    folder: Path,
    task: Task,
    *,
    table: str | None = None,
    partition: str | None = None,
    sites: int = 5,
    seed: int = 0,
) -> ListedManifest:
    """The same as `read_manifest`, but a folder without a usable case is no error.

    Raises:
        DataError: the folder, its table or its labels.yaml cannot be read at all.
    """
    folder = Path(folder)
    if partition is not None:
        parse_partition(partition)
    try:
        listing = layouts.list_folder(folder, task, table)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the data folder cannot be listed ({type(error).__name__}): let fedseg read it, and "
            "see that no link in it leads in a circle"
        ) from None
    rows, findings = _consistent(listing, sited=partition is None)
    patients = {row.name: row.patient or row.name for row in rows}
    site_of = {patients[row.name]: row.site or "" for row in rows}
    if partition is not None and rows:
        site_of = assign_sites(_label_sizes(rows, patients), partition, sites, seed)
    split_of: Mapping[str, str] = {patients[row.name]: row.split or "" for row in rows}
    if not all(split_of.values()):
        split_of = assign_splits((row.patient or row.name for row in listing.rows), seed)
    written = label_maps.read_labels_file(folder)
    annotated = label_maps.annotated_at(written, task, sorted(set(site_of.values())))
    cases = [_case(row, patients[row.name], site_of, split_of, annotated) for row in rows]
    return ListedManifest(
        root=folder,
        cases=tuple(sorted(cases, key=lambda case: case.name)),
        label_map=_label_map(written, listing, task, annotated),
        findings=(*listing.findings, *findings),
        orphans=listing.orphans,
    )


def _case(
    row: Row,
    patient: str,
    site_of: Mapping[str, str],
    split_of: Mapping[str, str],
    annotated: Mapping[str, tuple[str, ...]],
) -> Case:
    """The case of a row whose split is one of the three."""
    split: Split = next(s for s in SPLITS if s == split_of[patient])
    site = site_of[patient]
    return Case(row.name, patient, site, split, row.images, row.label, annotated.get(site))


def _label_map(
    written: label_maps.LabelsFile | None,
    listing: Listing,
    task: Task,
    annotated: Mapping[str, tuple[str, ...]],
) -> label_maps.Mapped:
    """labels.yaml first, then the dataset's names, else nothing to map."""
    if written is not None and written.values:
        return label_maps.map_from_file(written.values, task)
    if listing.label_names is None:
        return ()
    needed = {name for names in annotated.values() for name in names} if annotated else None
    return label_maps.map_from_names(listing.label_names, task, needed)


def _consistent(listing: Listing, *, sited: bool) -> tuple[list[Row], list[Finding]]:
    """The rows that agree with each other, and a finding for each of the others."""
    findings: list[Finding] = []
    rows = _once(listing.rows, findings)
    rows = _complete(rows, "patient", None, findings)
    rows = _complete(rows, "split", lambda text: text.casefold() in SPLITS, findings)
    rows = [replace(row, split=(row.split or "").casefold()) for row in rows]
    if sited:
        rows = _complete(rows, "site", lambda text: bool(SITE_NAME.fullmatch(text)), findings)
    rows = _one_each(rows, "split", "splits", findings)
    if sited:
        rows = _one_each(rows, "site", "sites", findings)
    rows = _own_images(rows, findings)
    if rows and not any(row.patient for row in rows):
        findings += _patients_unknown(listing)
    return rows, findings


def _once(rows: Iterable[Row], findings: list[Finding]) -> list[Row]:
    """Each case once: equal rows count once, rows that contradict each other not at all."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.name].append(row)
    kept = []
    for name, group in groups.items():
        where = ", ".join(row.where for row in group)
        if len(group) == 1:
            kept += group
        elif len({replace(row, where="") for row in group}) == 1:
            kept.append(group[0])
            findings.append(
                Finding(
                    name,
                    "warning",
                    "row-duplicate",
                    f"the same row occurs {len(group)} times ({where}); it counts once",
                    "keep one row",
                )
            )
        else:
            findings.append(
                Finding(
                    name,
                    "error",
                    "row-duplicate",
                    f"{len(group)} rows name this case and contradict each other ({where})",
                    "keep the right one",
                )
            )
    return kept


def _complete(
    rows: list[Row],
    column: str,
    valid: Callable[[str], bool] | None,
    findings: list[Finding],
) -> list[Row]:
    """Rows with a valid cell in a column; a column that is empty everywhere counts as absent."""
    if not any(getattr(row, column) for row in rows):
        return rows
    kept = []
    remedies = {
        "patient": "write the same patient in all rows of one person",
        "split": "write train, val or test",
        "site": "use letters, digits, '_', '.' and '-', at most 64",
    }
    for row in rows:
        text = getattr(row, column)
        if text and (valid is None or valid(text)):
            kept.append(row)
            continue
        problem = f"{column} is {text[:40]!r}" if text else f"the column {column} is empty"
        code = f"row-{column}"
        findings.append(
            Finding(row.name, "error", code, f"{row.where}: {problem}", remedies[column])
        )
    return kept


def _one_each(rows: list[Row], column: str, plural: str, findings: list[Finding]) -> list[Row]:
    """Rows of patients that have one value in a column; the other patients are left out whole."""
    seen: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        seen[row.patient or row.name].add(getattr(row, column) or "")
    kept = []
    for row in rows:
        values = seen[row.patient or row.name]
        if len(values) == 1:
            kept.append(row)
            continue
        findings.append(
            Finding(
                row.name,
                "error",
                f"patient-in-two-{plural}",
                f"{row.where}: its patient stands in {len(values)} {plural} "
                f"({', '.join(sorted(values))})",
                f"give all cases of a patient the same {column}",
            )
        )
    return kept


def _own_images(rows: list[Row], findings: list[Finding]) -> list[Row]:
    """Rows whose image files belong to one patient only."""
    owners: dict[Path, set[str]] = defaultdict(set)
    for row in rows:
        for path in row.images:
            owners[path.resolve()].add(row.patient or row.name)
    kept = []
    for row in rows:
        if max(len(owners[path.resolve()]) for path in row.images) == 1:
            kept.append(row)
            continue
        findings.append(
            Finding(
                row.name,
                "error",
                "image-shared",
                f"{row.where}: the same image is listed under two patients",
                "say whose image it is and remove the other row",
            )
        )
    return kept


def _patients_unknown(listing: Listing) -> list[Finding]:
    """A table without patients; folders without a table have said so already."""
    if any(finding.code == "no-table" for finding in listing.findings):
        return []
    return [
        Finding(
            "",
            "warning",
            "patients-unknown",
            "the table has no column patient: each case was taken as its own patient",
            "add the column patient, so that no person stands in two splits",
        )
    ]


def _label_sizes(rows: Iterable[Row], patients: Mapping[str, str]) -> dict[str, float]:
    """Mean label volume in ml of every patient; the size of the file where it is no NIfTI."""
    sizes: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        sizes[patients[row.name]].append(_label_size(row.label))
    return {patient: float(np.mean(values)) for patient, values in sizes.items()}


def _label_size(path: Path | None) -> float:
    """Foreground of a label in ml, or a stand-in that grows with it."""
    from fedseg.imaging.readers import is_dicom, load_nifti

    if path is None:
        return 0.0
    if is_dicom(path):
        return path.stat().st_size / 1e6
    try:
        label, affine = load_nifti(path, "label")
    except CaseError:
        return 0.0
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    return voxel_ml * int(np.count_nonzero(label))
