"""A task for data that no study has a plan for yet, so that a hospital can check them first.

Channels come from dataset.json, from file names or from DICOM; labels from the names that the
data give, else from the values that occur. A value that only one of many labels holds is taken
for a mistake, and then named as one by the check. Nothing is trained with a guessed task.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedseg.imaging import label_maps, layouts
from fedseg.imaging.findings import Finding
from fedseg.imaging.listings import Row, stem_of
from fedseg.imaging.readers import distinct, is_dicom, load_nifti
from fedseg.imaging.volumes import ras_spacing_of
from fedseg.task import Task

MAX_LOOKED_AT = 50
MANY = 4


@dataclass(frozen=True)
class Guess:
    """A task that fits the data, and how their values read in it.

    Attributes:
        task: its patch size means nothing.
        label_map: value in the files -> value in the task; empty where they are the same.
        findings: what a person should look at.
    """

    task: Task
    label_map: tuple[tuple[int, int], ...]
    findings: tuple[Finding, ...]


def guess_task(folder: Path, table: str | None = None) -> Guess:
    """Look at up to fifty cases and say what they seem to be.

    Raises:
        DataError: the folder cannot be listed at all.
    """
    names = _channel_names(folder)
    listing = layouts.list_folder(folder, _task(names, ["MR"] * len(names), {"any": 1}), table)
    rows = listing.rows[:MAX_LOOKED_AT]
    looks = [look for row in rows if (look := _look(row)) is not None]
    modality = Counter(m for m, _ in looks).most_common(1)[0][0] if looks else "MR"
    middle = np.median([s for _, s in looks], axis=0) if looks else np.ones(3)
    labels, label_map, findings = _labels(folder, listing.label_names or {}, rows)
    task = _task(names, [modality] * len(names), labels, [round(float(s), 4) for s in middle])
    return Guess(task, label_map, findings)


def _task(
    names: list[str], modalities: list[str], labels: dict[str, int], spacing: Iterable[float] = ()
) -> Task:
    """A 3-D task of these channels and labels."""
    channels = [{"name": n, "modality": m} for n, m in zip(names, modalities, strict=True)]
    return Task.model_validate(
        {
            "dimensions": 3,
            "channels": channels,
            "labels": labels,
            "spacing_mm": list(spacing) or [1, 1, 1],
            "patch_size": [16, 16, 16],
            "normalisation": {"CT": {"window_hu": [-1000, 1000]}},
        }
    )


def _channel_names(folder: Path) -> list[str]:
    """Channel names by dataset.json or by numbered files."""
    try:
        data = json.loads((folder / "dataset.json").read_bytes())
        given = data.get("channel_names") or data["modality"]
        return [str(given[key])[:32] for key in sorted(given, key=int)][:8] or ["image"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass
    numbers = {
        int(stem[-4:])
        for place in layouts.IMAGE_FOLDERS
        for path in (folder / place).glob("*_000[0-7].nii*")
        if (stem := stem_of(path.name))
    }
    return [f"channel_{n}" for n in sorted(numbers)] if len(numbers) > 1 else ["image"]


def _look(row: Row) -> tuple[str, tuple[float, float, float]] | None:
    """Modality and spacing of a case's first image; None where it cannot be read."""
    path = row.images[0]
    try:
        if is_dicom(path):
            from fedseg.imaging import dicom

            series = dicom.read_series(path)
            modality = series.modality if series.modality in ("CT", "MR") else "MR"
            return modality, ras_spacing_of(series.affine_ras)
        array, affine = load_nifti(path, "image")
        return ("CT" if float(np.nanmin(array)) <= -500 else "MR"), ras_spacing_of(affine)
    except ImportError:
        raise
    except Exception:
        return None


def _labels(
    folder: Path, names: Mapping[str, int], rows: Iterable[Row]
) -> tuple[dict[str, int], tuple[tuple[int, int], ...], tuple[Finding, ...]]:
    """Label names with the task's values, the map to them, and what is odd."""
    written = label_maps.read_labels_file(folder)
    if written is not None and written.values:
        return _numbered(written.names), (), ()
    named = [n for n, v in sorted(names.items(), key=lambda item: item[1]) if v]
    if named:
        return _numbered(named), (), ()
    values, segments = _values(rows)
    if segments:
        return _numbered(segments), (), ()
    task = {f"value_{value}": index for index, value in enumerate(values, start=1)}
    if values == list(range(1, len(values) + 1)) or not values:
        return task or {"value_1": 1}, (), ()
    holes = sorted(set(range(1, max(values))) - set(values))
    shown = ", ".join(str(v) for v in holes[:8]) + (", ..." if len(holes) > 8 else "")
    finding = Finding(
        "",
        "warning",
        "label-values-holes",
        f"label values {', '.join(str(v) for v in values[:12])} occur, but not {shown}",
        "see that no value is a mistake; name them in labels.yaml",
    )
    return task, tuple((value, index) for index, value in enumerate(values, start=1)), (finding,)


def _values(rows: Iterable[Row]) -> tuple[list[int], list[str]]:
    """Foreground values that NIfTI labels hold, and segment names of DICOM SEG labels."""
    counts: Counter[int] = Counter()
    segments: dict[str, None] = {}
    labelled = 0
    for row in rows:
        if row.label is None:
            continue
        try:
            if is_dicom(row.label):
                segments.update(dict.fromkeys(_segment_names(row.label)))
                continue
            array, _ = load_nifti(row.label, "label")
            found = [int(v) for v in distinct(array) if v == int(v) and v > 0]
        except ImportError:
            raise
        except Exception:
            continue
        labelled += 1
        counts.update(found[:255])
    least = 2 if labelled >= MANY else 1
    values = sorted(value for value, n in counts.items() if n >= least)
    return values[:255], list(segments)[:255]


def _segment_names(path: Path) -> list[str]:
    """Names of the segments of a DICOM SEG."""
    from fedseg.imaging import dicom

    sequence = dicom.read_dataset(path, pixels=False).get("SegmentSequence", None) or ()
    return [str(item.SegmentLabel) for item in sequence]


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """Names with the values 1, 2, 3, ..."""
    return {name: index for index, name in enumerate(names, start=1)}
