"""What daemon and ServerApp open by themselves, at any hour: the study key and the audit."""

from __future__ import annotations

from datetime import UTC, datetime

from coordinator.folder import StudyFolder
from coordinator.founding import stamp
from fedseg.chain import Chain
from fedseg.errors import TrustError
from fedseg.security.keys import SigningKey, is_encrypted, load_signing_key
from fedseg.shell import PASSPHRASE_FILE, passphrase


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


def audit_of(folder: StudyFolder, key: SigningKey) -> Chain:
    """The study's audit chain, to append to."""
    return Chain(folder.audit, key, lambda: stamp(datetime.now(UTC)))
