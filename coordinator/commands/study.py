"""What every command about a study asks for: its folder, and its key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedseg.shell import passphrase

if TYPE_CHECKING:
    from coordinator.folder import StudyFolder
    from fedseg.security.keys import SigningKey

StudyPath = Annotated[
    Path,
    typer.Option("--study", metavar="STUDYDIR", envvar="FEDSEG_STUDY", help="The study's folder."),
]


def unlocked(folder: StudyFolder) -> tuple[SigningKey, bytes | None]:
    """The study key, and the passphrase that it and the authority's key have in common.

    Raises:
        TrustError: the key is missing or damaged, or the passphrase is wrong.
    """
    from fedseg.security.keys import is_encrypted, load_signing_key

    ask = "Passphrase of the study" if is_encrypted(folder.study_key) else None
    secret = passphrase(ask)
    return load_signing_key(folder.study_key, secret), secret
