"""What the values in a hospital's label files mean in the study.

A file `labels.yaml` beside the data says it: value in the files (or segment number of a DICOM
SEG) -> name of a study label, or background. Without it, the names of a dataset.json are matched
to the plan's; without either, values mean what the plan says they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from fedseg.errors import DataError
from fedseg.plan import Task

LABELS_FILE = "labels.yaml"
BACKGROUND = "background"
Mapped = tuple[tuple[int, int], ...]


def read_labels_file(folder: Path) -> dict[int, str] | None:
    """The folder's labels.yaml as value -> name, or None where there is none.

    Raises:
        DataError: not a mapping of whole numbers to names.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    try:
        data = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
        data = None
    entries = data if isinstance(data, dict) else {}
    if not entries or not all(
        type(k) is int and k >= 0 and isinstance(v, str) for k, v in entries.items()
    ):
        raise DataError(
            f"{LABELS_FILE} must map whole numbers to names, one a line, for example "
            "'1: liver' or '7: background'"
        )
    return entries


def map_from_file(names: Mapping[int, str], task: Task) -> Mapped:
    """The label map that labels.yaml gives for a study.

    Raises:
        DataError: a name that is neither a label of the study nor background.
    """
    known = {name.casefold(): value for name, value in task.labels.items()} | {BACKGROUND: 0}
    unknown = sorted({name for name in names.values() if name.casefold() not in known})
    if unknown:
        raise DataError(
            f"{LABELS_FILE} names {', '.join(unknown[:8])}; the study's labels are "
            f"{', '.join(task.labels)}, or background"
        )
    return tuple(sorted((value, known[name.casefold()]) for value, name in names.items()))


def map_from_names(names: Mapping[str, int], task: Task) -> Mapped:
    """The label map that a dataset.json's names give; empty where they change nothing.

    Only names that the study has are mapped: any other value is an error when it is met, because
    a structure inside another one must not silently become background.

    Raises:
        DataError: the dataset has names, and none or not all of the study's labels are among them.
    """
    own = {name.casefold(): value for name, value in names.items()}
    lost = [name for name in task.labels if name.casefold() not in own]
    if lost:
        raise DataError(
            f"dataset.json names the labels {', '.join(names)}; the study's "
            f"{', '.join(lost)} is not among them: say in {LABELS_FILE} what each value means"
        )
    pairs = [(own[name.casefold()], value) for name, value in task.labels.items()]
    if own.get(BACKGROUND, 0) != 0:
        pairs.append((own[BACKGROUND], 0))
    everything = {value for name, value in own.items() if name != BACKGROUND}
    same = all(a == b for a, b in pairs) and everything == set(task.labels.values())
    return () if same else tuple(sorted(pairs))
