"""The output folder of a study: taken for one plan and one set of data, and never mixed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedseg.durable import write_atomically
from fedseg.errors import DataError
from fedseg.plan import StudyPlan

PLAN, DATA, NOISE = "plan.json", "data.json", "noise.json"


def refuse_occupied(out: Path, plan: StudyPlan, *, resume: bool) -> None:
    """Refuse a folder that holds another study, or this one unless it is resumed.

    Raises:
        DataError: the folder is not free for this plan.
    """
    note = out / PLAN
    if not note.exists():
        if out.exists() and any(path.suffix != ".part" for path in out.iterdir()):
            raise DataError(f"{out.name} is not empty and holds no study: give another --out")
        return
    if note.read_bytes() != plan.canonical_bytes:
        raise DataError(f"{out.name} holds a study of another plan: give another --out")
    if not resume:
        raise DataError(
            f"{out.name} holds this study already: go on with --resume, or give another --out"
        )


def pin(out: Path, plan: StudyPlan, data: Mapping[str, str], noise_seed: int | None = None) -> None:
    """Take the folder for a plan and the fingerprints of its sites' data, for its owner alone.

    Args:
        noise_seed: of a seeded run of a private plan; half a seeded run is not private either.

    Raises:
        DataError: the study there was begun with other data, or with noise from elsewhere.
        StorageError: the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    out.chmod(0o700)  # pictures of patients will lie here
    write_atomically(out / PLAN, plan.canonical_bytes)
    if plan.private is not None:
        _pin_noise(out, noise_seed)
    note = out / DATA
    if not note.exists():
        write_atomically(note, json.dumps(data, indent=1, sort_keys=True).encode())
        return
    before = json.loads(note.read_bytes())
    other = sorted(site for site in before.keys() | data if before.get(site) != data.get(site))
    if other:
        raise DataError(
            f"{out.name} was begun with other data: {', '.join(other)} differ; give the same "
            "--data, --table, --partition and --sites, or another --out"
        )


def _pin_noise(out: Path, seed: int | None) -> None:
    """Note where the noise of a private study comes from."""
    note = out / NOISE
    if not note.exists():
        write_atomically(note, json.dumps({"seed": seed}).encode())
    before = json.loads(note.read_bytes())["seed"]
    if before != seed:
        told = "without --noise-seed" if before is None else f"with --noise-seed {before}"
        raise DataError(f"{out.name} was begun {told}: go on like that, or give another --out")
