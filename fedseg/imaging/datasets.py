"""Data folders that a dataset.json describes: Medical Segmentation Decathlon and nnU-Net raw.

Neither says who the patients are: each case is taken as its own patient, and a finding says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fedseg.errors import DataError
from fedseg.imaging.findings import CaseError
from fedseg.imaging.listings import (
    ENDINGS,
    Listing,
    Row,
    inside,
    label_missing,
    must_exist,
    no_image,
    no_table,
    stem_of,
    stems_in,
)
from fedseg.task import Task

MAX_JSON_BYTES = 64 * 1024 * 1024


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
    rows, findings = [], [no_table(folder)]
    for number, entry in enumerate(entries, start=1):
        name = stem_of(PurePosixPath(entry["image"]).name)
        where = f"dataset.json, training entry {number}"
        try:
            image, label = (inside(folder, entry[key], where) for key in ("image", "label"))
            must_exist(image, entry["image"], where)
            row = Row(name, (image,), label if label.exists() else None, where=where)
        except CaseError as error:
            findings.append(error.of(name))
            continue
        rows.append(row)
        if row.label is None:
            findings.append(label_missing(row, entry["label"]))
    return Listing(tuple(rows), tuple(findings), _label_names(data))


def list_nnunet(folder: Path, task: Task, data: Mapping[str, Any]) -> Listing:
    """Cases of an nnU-Net raw folder: imagesTr/CASE_0000, ..., labelsTr/CASE."""
    ending = data.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        raise DataError(f"dataset.json: file_ending {ending!r} is not read; convert to .nii.gz")
    order = _channel_order(data.get("channel_names", data.get("modality")), task)
    stems = stems_in(folder, ("imagesTr",))
    names = sorted({stem[:-5] for stem in stems if stem[-5:-4] == "_" and stem[-4:].isdigit()})
    labels = stems_in(folder, ("labelsTr",))
    rows, findings, orphans = [], [no_table(folder)], []
    for name in names:
        lost = [i for i in order if f"{name}_{i:04d}" not in stems]
        if lost:
            findings.append(no_image(f"imagesTr/{name}_{lost[0]:04d}{ending}", "").of(name))
            continue
        images = tuple(stems[f"{name}_{i:04d}"] for i in order)
        rows.append(Row(name, images, labels.get(name), where=f"imagesTr/{name}"))
        if name not in labels:
            findings.append(label_missing(rows[-1], f"labelsTr/{name}{ending}"))
    for name in sorted(set(labels) - set(names)):
        findings.append(no_image(f"imagesTr/{name}_0000{ending}", "").of(name))
        orphans.append((name, labels[name]))
    return Listing(tuple(rows), tuple(findings), _label_names(data), tuple(orphans))


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


def read_dataset_json(path: Path) -> dict[str, Any]:
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
