"""The study key: its public half, and how a run opens the other at an hour when nobody is there."""

from __future__ import annotations

from coordinator.folder import StudyFolder, read_part
from fedseg.errors import TrustError
from fedseg.security.keys import SigningKey, VerifyKey, is_encrypted, load_signing_key
from fedseg.shell import PASSPHRASE_FILE, passphrase

MAX_KEY_BYTES = 256


def public_text(folder: StudyFolder) -> str:
    """The study's public key as its file has it."""
    return read_part(folder.study_public, MAX_KEY_BYTES).decode("ascii", "replace").strip()


def public_key(folder: StudyFolder) -> VerifyKey:
    """What everything that the study signs is verified with.

    Raises:
        TrustError: the file holds no key.
        DataError: it cannot be read.
    """
    return VerifyKey.from_text(public_text(folder))


def unattended_key(folder: StudyFolder) -> SigningKey:
    """The study key; its passphrase must lie in a file, for runs start without anybody there.

    Raises:
        TrustError: missing, damaged, or encrypted and no file is named.
    """
    secret = passphrase()
    if secret is None and is_encrypted(folder.study_key):
        raise TrustError(
            f"the study key has a passphrase: name a file that holds it in {PASSPHRASE_FILE}, "
            "readable by this user alone, because a run may start again at any hour"
        )
    return load_signing_key(folder.study_key, secret)
