"""The hospitals' own models on the coordinator's disk, from the last round until they are measured.

A hospital's own model is the last shared one with that hospital's last update. The coordinator has
both anyway; a hospital that consents says by digest which model it lets go, so both compute it by
the same sums and get the same bits. Each lies in a file of its own from before its update counts,
so that a killed study goes on; the folder is 0700 and its files 0600, for they are updates in the
clear. Each is removed once no stage to come measures it. The list of sites lies in the file as the
hospital had accepted it by then: it let its model go to those, and to none that joins later.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.aggregation.spill import sweep
from fedseg.arrays import Arrays, digest_of
from fedseg.container import packed, unpack
from fedseg.durable import make_folder, write_atomically
from fedseg.errors import StorageError, TrustError
from fedseg.frozen import Frozen
from fedseg.plan import StudyPlan
from fedseg.security.consent import Consent
from fedseg.security.identity import SignedRoll
from fedseg.updates import model_limit

_ENDING = ".own"


class LostModelError(TrustError):
    """An own model that was kept is not there any more, or is another one."""


class LetGo(Frozen):
    """The consent to a model, and the list of sites in force when it came; None in a simulation."""

    consent: Consent
    roll: SignedRoll | None = None

    def joined_since(self, now: SignedRoll | None) -> tuple[str, ...]:
        """Who is on the list now and was not then, or has other keys."""
        if now is None or self.roll is None:
            return ()
        return now.roll.added_since(self.roll.roll)


def own_model(shared: Arrays, update: Arrays) -> dict[str, NDArray[Any]]:
    """The shared model with one hospital's update, in the model's dtypes.

    Args:
        shared: every tensor of the model.
        update: trained less shared, of the tensors that travel; the others stay as they are.
    """
    return {
        name: np.add(values, update[name]).astype(values.dtype) if name in update else values
        for name, values in shared.items()
    }


class OwnModels:
    """A folder with one file a hospital."""

    def __init__(self, folder: Path, plan: StudyPlan) -> None:
        self._folder, self._plan = folder, plan

    def keep(self, kept: LetGo, model: Arrays) -> None:
        """Store one hospital's own model; it is on disk, whole, when this returns.

        Raises:
            StorageError: the disk is full or the place cannot be written.
        """
        try:
            make_folder(self._folder, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"cannot make {self._folder.name}, where hospitals' own models are kept: "
                f"{error.strerror}; mend the rights and start again"
            ) from error
        write_atomically(self._path(kept.consent.site), packed(kept, model), mode=0o600)

    def load(self, site: str, digest: str) -> tuple[LetGo, dict[str, NDArray[Any]]]:
        """What was kept of a hospital: the model that the study's history has.

        Raises:
            LostModelError: it is not there, damaged, or another one.
        """
        schema, limit = self._plan.built.tensors, model_limit(self._plan)
        try:
            data = self._path(site).read_bytes()
            kept, model = unpack(data, LetGo, max_bytes=limit, schema=schema)
        except OSError as error:
            raise LostModelError(f"{site}'s own model cannot be read: {error.strerror}") from None
        except TrustError as error:
            raise LostModelError(f"{site}'s own model is damaged: {error}") from None
        said = kept.consent.model, kept.consent.site
        if not said == (digest, site) == (digest_of(model), site):
            raise LostModelError(f"{site}'s own model is not the one that the study's history has")
        return kept, model

    def keep_only(self, sites: Collection[str]) -> None:
        """Remove all but these hospitals' own models, and drafts that a crash left.

        Raises:
            StorageError: they cannot be removed.
        """
        if not sites:
            sweep(self._folder)
            return
        kept = {self._path(site) for site in sites}
        try:
            for path in {*self._folder.glob("*")} - kept:
                path.unlink()
        except OSError as error:
            raise StorageError(
                f"cannot remove hospitals' own models from {self._folder.name}: {error.strerror}; "
                "mend the rights and start again"
            ) from error

    def _path(self, site: str) -> Path:
        """Where a hospital's own model lies."""
        return self._folder / f"{site}{_ENDING}"
