"""The signed roll on disk, and the one place where it is read.

Who enrols or revokes a site writes the file, a study's run only reads it: again whenever the file
is another one. There it never goes back: an older roll put in the place of a newer one, and with it
a revoked site, stops the run.
"""

from __future__ import annotations

import os
from pathlib import Path

from coordinator.folder import StudyFolder
from coordinator.office.key import public_key
from fedseg.errors import TrustError
from fedseg.security.identity import MAX_ROLL_BYTES, SignedRoll, open_roll
from fedseg.security.keys import VerifyKey


class Registry:
    """One study's registry.json."""

    def __init__(self, path: Path, key: VerifyKey, study: str) -> None:
        self._path, self._key, self._study = path, key, study
        self._seen: tuple[int, int, int] | None = None
        self._roll: SignedRoll | None = None

    def read(self) -> SignedRoll:
        """The roll as it stands.

        Raises:
            TrustError: missing, not the study's, or older than the one that was read before.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                seen = (status.st_ino, status.st_mtime_ns, status.st_size)
                if self._roll is not None and seen == self._seen:
                    return self._roll
                data = file.read(MAX_ROLL_BYTES + 1)
        except OSError as error:
            raise TrustError(
                f"cannot read the study's {self._path.name}: {error.strerror}"
            ) from None
        found, before = open_roll(data, self._key, self._study), self._roll
        if before is not None and found.roll.version < before.roll.version:
            raise TrustError(
                f"the registry has version {found.roll.version}, it had {before.roll.version}: an "
                "older one was put in its place; restore the newer one"
            )
        self._seen, self._roll = seen, found
        return found


def registry_of(folder: StudyFolder, key: VerifyKey) -> Registry:
    """The registry of a study's folder, which this key must have signed.

    Raises:
        DataError: the folder is no study's.
    """
    return Registry(folder.registry, key, folder.settings().study)


def current_roll(folder: StudyFolder) -> SignedRoll:
    """The roll as it stands, checked against the study's public key.

    Raises:
        TrustError: the registry is missing or was not signed by the study key.
        DataError: the folder is no study's.
    """
    return registry_of(folder, public_key(folder)).read()
