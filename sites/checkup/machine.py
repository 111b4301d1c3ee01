"""The machine: Python and packages, graphics processor, disk."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.metadata import metadata as metadata_of
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedseg.errors import FedsegError
from fedseg.plan import StudyPlan, load_plan
from sites.answers import PLAIN_ROUNDS_KEPT, SEALED_ROUNDS_KEPT
from sites.checkup.verdict import Verdict, fail, warn, well
from sites.folder import SiteFolder

NVIDIA = Path("/dev/nvidiactl")
SPARE_BYTES = 2_000_000_000
PREPARED_TO_FILE = 4  # compressed 16-bit scans become 32-bit arrays
_MODEL_COPIES = 6  # spool (task and answer), optimiser state (two moments), new and old final model


def python_and_packages(extra: str) -> Verdict:
    """Versions against what this fedseg was made for.

    Args:
        extra: "site" for the trainer's packages too, "" for the relay's alone.
    """
    subject, wrong = "Python and packages", []
    wanted = metadata_of("fedseg")["Requires-Python"] or ""
    if not SpecifierSet(wanted).contains(platform.python_version()):
        wrong.append(f"Python {platform.python_version()} (needs {wanted})")
    for line in requires("fedseg") or []:
        wrong += _wrong(Requirement(line), extra)
    if wrong:
        install = f"pip install 'fedseg[{extra}]'" if extra else "pip install fedseg"
        return fail(
            subject,
            "not as this fedseg needs them: " + ", ".join(wrong),
            f"install fedseg anew in its own environment: {install}; best from the lock file that "
            "belongs to this version",
        )
    return well(
        subject, f"fedseg {version('fedseg')} on Python {platform.python_version()}, all fit"
    )


def graphics() -> Verdict:
    """What torch would train on; torch is imported here and nowhere else in the doctor."""
    subject = "GPU"
    try:
        import torch
    except ImportError:
        return fail(
            subject,
            "torch cannot be imported, so nothing can be trained",
            "pip install 'fedseg[site]'; on the relay's machine say --half relay",
        )
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return well(subject, f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    if not NVIDIA.exists():
        return warn(
            subject,
            "none is visible: training runs on the processor, many times slower",
            "if this machine has one, install its driver; in a container pass the device on",
        )
    if torch.version.cuda is None:
        return warn(
            subject,
            "there is one, but this torch was built without CUDA",
            "install a torch with CUDA, for example from the trainer's lock file",
        )
    return warn(
        subject,
        f"there is one, but torch (CUDA {torch.version.cuda}) cannot use it",
        "run nvidia-smi as the trainer's user: update the driver, or give that user the device",
    )


def disk(folder: SiteFolder, data_bytes: Mapping[str, int]) -> Verdict:
    """Room for prepared cases, stored answers and models of the studies that were joined.

    Args:
        data_bytes: study -> size of the files of its approved cohort.
    """
    subject, free = "Disk", shutil.disk_usage(folder.path).free
    need, unknown = SPARE_BYTES, []
    for study in folder.joined:
        try:
            need += _study_bytes(load_plan(folder.plan(study)), data_bytes.get(study, 0))
        except FedsegError:
            unknown.append(study)
        if study not in data_bytes:
            unknown.append(study)
    need = max(SPARE_BYTES, need - _size(folder.cache) - _size(folder.studies))
    says = f"{free / 1e9:.1f} GB free, about {need / 1e9:.1f} GB may still be needed"
    if unknown:
        says += f" (without the cases of {', '.join(sorted(set(unknown)))}: not approved yet)"
    if free < need:
        return fail(
            subject,
            says,
            "make room, or move the folder to a larger disk; `fedseg-site cache purge` drops "
            "prepared cases of studies that ended",
        )
    return well(subject, says)


def size_of_files(paths: Iterator[Path]) -> int:
    """Bytes of these files; folders count with all that lies in them."""
    return sum(_size(path) for path in paths)


def _wrong(requirement: Requirement, extra: str) -> list[str]:
    """A package that is missing or of another version than it should be."""
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
        return []
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return [f"{requirement.name} is missing (needs {requirement.specifier or 'any'})"]
    if requirement.specifier.contains(found, prereleases=True):
        return []
    return [f"{requirement.name} {found} (needs {requirement.specifier})"]


def _study_bytes(plan: StudyPlan, data_bytes: int) -> int:
    """What one study may come to hold here, at most or nearly so."""
    model = plan.built.nbytes
    answers = min(PLAIN_ROUNDS_KEPT, plan.aggregation.rounds) * plan.aggregation.attempts
    sealed = min(SEALED_ROUNDS_KEPT, plan.aggregation.rounds) * plan.aggregation.attempts
    return model * (answers + sealed + _MODEL_COPIES) + PREPARED_TO_FILE * data_bytes


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if not path.is_dir():
        with suppress(OSError):
            return path.stat().st_size
        return 0
    total = 0
    for root, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += (Path(root) / name).lstat().st_size
    return total
