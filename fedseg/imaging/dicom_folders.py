"""A folder of DICOM files: one case for every series, its label found by reference."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedseg.imaging import dicom
from fedseg.imaging.findings import CaseError, Finding
from fedseg.imaging.listings import Listing, Row, label_missing, no_table, relative
from fedseg.imaging.segmentations import contours_refused


def list_dicom(folder: Path) -> Listing:
    """One case for every folder that holds DICOM images; segmentations by their references."""
    images: dict[Path, list[Any]] = {}
    others: list[tuple[Path, Any]] = []
    findings: list[Finding] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        try:
            header = dicom.read_header(path)
        except (CaseError, OSError) as error:
            if isinstance(error, CaseError):
                findings.append(error.of(relative(folder, path.parent)))
            continue
        if header is None:
            continue
        if header.get("Modality") in dicom.NOT_IMAGES:
            others.append((path, header))
        else:
            images.setdefault(path.parent, []).append(header)
    rows = []
    for place, headers in images.items():
        name = relative(folder, place)
        label, found = _dicom_label(name, headers, others)
        findings += found
        patient = str(headers[0].get("PatientID", "") or "") or None
        rows.append(Row(name, (place,), label, patient, where=f"the series {name}"))
    if rows:
        findings.append(no_table(folder, "each series was taken as a case of its PatientID"))
    return Listing(tuple(rows), tuple(findings))


def _dicom_label(
    name: str, headers: list[Any], others: list[tuple[Path, Any]]
) -> tuple[Path | None, list[Finding]]:
    """The one segmentation that refers to a series, or why there is none."""
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
        return None, [contours_refused(h, there).of(name) for h in contours]
    return None, [label_missing(Row(name, (), None), "a DICOM SEG that refers to the series")]


def _series_of(header: Any) -> set[str]:
    """Series that a segmentation refers to."""
    items: Iterable[Any] = header.get("ReferencedSeriesSequence", None) or ()
    return {str(item.get("SeriesInstanceUID", "")) for item in items}
