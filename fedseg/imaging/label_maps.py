"""What the values in a hospital's label files mean in the study, and which labels it draws at all.

A file `labels.yaml` beside the data says it: value in the files (or segment number of a DICOM
SEG) -> name of a study label, or background. Without values in it, the names of a dataset.json are
matched to the plan's; without either, values mean what the plan says they mean.

Its entry `annotated` lists the labels that are drawn wherever they are: for all sites of the
folder, or by site. Without it that is all of the plan's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedseg.errors import DataError
from fedseg.task import Task

LABELS_FILE = "labels.yaml"
BACKGROUND = "background"
ANNOTATED = "annotated"
Mapped = tuple[tuple[int, int], ...]
Names = tuple[str, ...]


@dataclass(frozen=True)
class LabelsFile:
    """What a labels.yaml says, as it is written there.

    Attributes:
        values: value -> name; empty where it says nothing of values.
        annotated: the labels that are drawn, for every site or by site; None where it does not say.
    """

    values: Mapping[int, str]
    annotated: Names | Mapping[str, Names] | None = None

    @property
    def names(self) -> Names:
        """Every label that it names, once, background left out."""
        said = self.annotated or ()
        lists = list(said.values()) if isinstance(said, Mapping) else [said]
        named = [
            *(self.values[v] for v in sorted(self.values)),
            *(n for part in lists for n in part),
        ]
        return tuple(dict.fromkeys(n for n in named if n.casefold() != BACKGROUND))


def read_labels_file(folder: Path) -> LabelsFile | None:
    """The folder's labels.yaml, or None where there is none.

    Raises:
        DataError: not a mapping of whole numbers to names, or `annotated` lists no names.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    try:
        data = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
        data = None
    entries = dict(data) if isinstance(data, dict) else {}
    annotated = _annotated(entries.pop(ANNOTATED)) if ANNOTATED in entries else None
    if not (entries or annotated) or not all(
        type(k) is int and k >= 0 and isinstance(v, str) for k, v in entries.items()
    ):
        raise DataError(
            f"{LABELS_FILE} must map whole numbers to names, one a line, for example "
            f"'1: liver' or '7: background'; besides, '{ANNOTATED}: [liver]' lists what is drawn"
        )
    return LabelsFile(entries, annotated)


def annotated_at(file: LabelsFile | None, task: Task, sites: Collection[str]) -> dict[str, Names]:
    """Site -> the labels that it declares as annotated; a site without a declaration is left out.

    Args:
        sites: of the data; "" where these name none.

    Returns:
        Labels by the plan's names, in the order of their numbers.

    Raises:
        DataError: a label that the study has not, or a site that the data have not.
    """
    said = None if file is None else file.annotated
    if said is None:
        return {}
    declared = said if isinstance(said, Mapping) else dict.fromkeys(sites, said)
    strangers = sorted(set(declared) - set(sites))
    if strangers:
        raise DataError(
            f"{ANNOTATED} in {LABELS_FILE} names the sites {', '.join(strangers)[:200]}; the data "
            f"have {', '.join(s or '(no name)' for s in sites)[:200]}: name these, or list labels "
            "for all of them alike"
        )
    return {site: _in_plan(names, task) for site, names in declared.items()}


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


def map_from_names(
    names: Mapping[str, int], task: Task, needed: Collection[str] | None = None
) -> Mapped:
    """The label map that a dataset.json's names give; empty where they change nothing.

    Only names that the study has are mapped: any other value is an error when it is met, because
    a structure inside another one must not silently become background.

    Args:
        needed: the study's labels that the dataset must have; by default all of them.

    Raises:
        DataError: the dataset has names, and not all of the needed labels are among them.
    """
    own = {name.casefold(): value for name, value in names.items()}
    wanted = task.labels if needed is None else needed
    lost = [name for name in task.labels if name in wanted and name.casefold() not in own]
    if lost:
        raise DataError(
            f"dataset.json names the labels {', '.join(names)}; the study's "
            f"{', '.join(lost)} is not among them: say in {LABELS_FILE} what each value means, or "
            f"under '{ANNOTATED}' which of the study's labels are drawn here"
        )
    known = {name: value for name, value in task.labels.items() if name.casefold() in own}
    pairs = [(own[name.casefold()], value) for name, value in known.items()]
    if own.get(BACKGROUND, 0) != 0:
        pairs.append((own[BACKGROUND], 0))
    everything = {value for name, value in own.items() if name != BACKGROUND}
    same = all(a == b for a, b in pairs) and everything == set(known.values())
    return () if same else tuple(sorted(pairs))


def _annotated(said: Any) -> Names | dict[str, Names]:
    """The entry `annotated`: names, or names by site."""
    if isinstance(said, dict) and said and all(isinstance(site, str) for site in said):
        return {site: _names(names) for site, names in said.items()}
    return _names(said)


def _names(said: Any) -> Names:
    """A list of names, at least one, each once."""
    names = said if isinstance(said, list) else []
    if not names or not all(isinstance(n, str) for n in names) or len({*names}) < len(names):
        raise DataError(
            f"'{ANNOTATED}' in {LABELS_FILE} must list at least one label, each once, for example "
            f"'{ANNOTATED}: [liver, tumour]'; or such a list for each site by its name"
        )
    return tuple(names)


def _in_plan(names: Names, task: Task) -> Names:
    """Declared names as the plan writes them, in the order of its numbers."""
    wanted = {name.casefold() for name in names}
    unknown = sorted(wanted - {name.casefold() for name in task.labels})
    if unknown:
        raise DataError(
            f"'{ANNOTATED}' in {LABELS_FILE} names {', '.join(unknown[:8])}; the study's labels "
            f"are {', '.join(task.labels)}"
        )
    by_value = sorted(task.labels, key=task.labels.__getitem__)
    return tuple(name for name in by_value if name.casefold() in wanted)
