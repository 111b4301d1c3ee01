"""Founding a study: a plan becomes a folder with keys, certificates and an empty roll.

The folder appears as a whole or not at all: everything is written into a draft inside it, and
`study.json`, without which nobody takes the folder for a study, is moved into place last. Keys are
made here, each in the place where it stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from coordinator.folder import Settings, StudyFolder, read_part
from coordinator.office.key import public_text
from fedseg.chain import Chain
from fedseg.durable import write_atomically
from fedseg.errors import DataError, PlanError
from fedseg.initial import initial_path, load_initial
from fedseg.modelfile import save_model
from fedseg.plan import StudyPlan, load_plan
from fedseg.security.certificates import make_ca, make_server_certificate
from fedseg.security.documents import stamp
from fedseg.security.identity import Roll, sign_roll
from fedseg.security.keys import SigningKey, fingerprint, save_key
from fedseg.security.secretfile import read_secret, write_secret

ROLL_DAYS = 397
MAX_PEM_BYTES = 16 * 1024
LOOPBACK = ("localhost", "127.0.0.1")
_DRAFT = ".draft"


def found(
    folder: StudyFolder,
    plan_file: Path,
    settings: Settings,
    *,
    now: datetime,
    passphrase: bytes | None = None,
) -> None:
    """Make a study's folder.

    Args:
        folder: does not exist yet, or is empty.
        plan_file: a built plan, with its initial model beside it.
        settings: its study must be the plan's.
        now: in UTC.
        passphrase: encrypts the study key and the authority's; the server's key has none, because
            the proxy starts without anybody at the keyboard.

    Raises:
        PlanError: the plan is not built, or its initial model is missing or another one.
        DataError: the folder is not empty or cannot be made.
        StorageError: the disk is full; nothing is left behind.
    """
    plan = load_plan(plan_file)
    if plan.study != settings.study:
        raise ValueError("the settings are of another study than the plan")
    model = _initial_of(plan, plan_file)
    with _whole(folder.path) as draft:
        secret = (draft.keys, draft.ca, draft.tls, draft.bundles)
        for place in (*secret, draft.rounds, draft.run, draft.logs):
            place.mkdir(mode=0o700)
        write_atomically(draft.settings_file, settings.model_dump_json(indent=2).encode() + b"\n")
        write_atomically(draft.plan_file, plan.canonical_bytes)
        save_model(draft.initial, plan, model, arm="initial", rounds=0)
        key = _make_keys(draft, settings, now, passphrase)
        _begin_roll(draft, plan, key, now)


def certify(folder: StudyFolder, host: str, now: datetime, passphrase: bytes | None) -> None:
    """Make a new key and certificate for the server, for the sites' address and for loopback.

    Raises:
        TrustError: the authority's key is missing, damaged, or has another passphrase.
    """
    server = make_server_certificate(
        read_secret(folder.ca_key),
        read_part(folder.ca_certificate, MAX_PEM_BYTES),
        tuple(dict.fromkeys((host, *LOOPBACK))),
        now,
        passphrase=passphrase,
    )
    write_secret(folder.server_key, server.key, replace=True)
    write_atomically(folder.server_certificate, server.certificate)


def study_fingerprint(folder: StudyFolder) -> str:
    """What a hospital compares by telephone when it joins; `Bundle.fingerprint` gives the same."""
    authority = read_part(folder.ca_certificate, MAX_PEM_BYTES)
    return fingerprint(folder.settings().study, public_text(folder), authority)


def _make_keys(
    draft: StudyFolder, settings: Settings, now: datetime, passphrase: bytes | None
) -> SigningKey:
    """The study key, the authority and the server's certificate."""
    key = SigningKey.generate()
    save_key(draft.study_key, key, passphrase)
    write_atomically(draft.study_public, key.public.text.encode() + b"\n")
    authority = make_ca(settings.study, now, passphrase)
    write_secret(draft.ca_key, authority.key)
    write_atomically(draft.ca_certificate, authority.certificate)
    certify(draft, settings.host, now, passphrase)
    return key


def _begin_roll(draft: StudyFolder, plan: StudyPlan, key: SigningKey, now: datetime) -> None:
    """A roll without sites, and an audit that says what the study was founded with."""
    end = now + timedelta(days=ROLL_DAYS)
    roll = Roll(study=plan.study, version=1, issued=stamp(now), valid_until=stamp(end))
    write_atomically(draft.registry, sign_roll(roll, key).canonical_bytes + b"\n")
    Chain(draft.audit, key, lambda: stamp(now)).append(
        "initialised",
        study=plan.study,
        plan=plan.digest,
        fingerprint=study_fingerprint(draft),
        version=roll.version,
        roll=roll.digest,
    )


def _initial_of(plan: StudyPlan, plan_file: Path) -> dict[str, NDArray[Any]]:
    """The model that a built plan starts from."""
    _ = plan.built  # raises where the plan is not built
    if plan.private:
        _ = plan.noise  # likewise
    model = load_initial(plan_file)
    if model is None:
        raise PlanError(
            f"{initial_path(plan_file).name} must lie beside {plan_file.name}: bring it, or run "
            "`fedseg plan build` again"
        )
    return model


@contextmanager
def _whole(path: Path) -> Iterator[StudyFolder]:
    """A draft of a folder; it takes the folder's place where all went well, else all is removed."""
    was_there = path.exists()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (path / _DRAFT).exists():
            raise DataError(f"an `init` was cut off in {path.name}: delete that folder, then again")
        if any(path.iterdir()):
            raise DataError(f"{path.name} is not empty: name a new folder for the study")
        draft = path / _DRAFT
        draft.mkdir(mode=0o700)
    except OSError as error:
        raise DataError(f"cannot make the folder {path.name}: {error.strerror}") from None
    try:
        yield StudyFolder(draft)
        for part in sorted(draft.iterdir(), key=lambda part: part.name == "study.json"):
            part.rename(path / part.name)
        draft.rmdir()
    except BaseException:
        for part in path.iterdir():
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        if not was_there:
            path.rmdir()
        raise
