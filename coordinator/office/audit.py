"""The study's audit: opened to append to, and asked what it says of sites and rolls."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from coordinator.folder import StudyFolder
from fedseg.chain import Chain, Entry, read_chain
from fedseg.security.documents import stamp
from fedseg.security.keys import SigningKey

_CHANGES = frozenset({"initialised", "enrolled", "revoked", "renewed", "restored"})


def audit_of(folder: StudyFolder, key: SigningKey) -> Chain:
    """The study's audit chain, to append to."""
    return Chain(folder.audit, key, lambda: stamp(datetime.now(UTC)))


def enrolled_at(folder: StudyFolder) -> dict[str, str]:
    """When each site was last enrolled, as the audit says; unverified."""
    entries = read_chain(folder.audit)
    return {str(e.facts.get("site")): e.at for e in entries if e.event == "enrolled"}


def rolls_named(entries: Sequence[Entry]) -> list[tuple[int, str]]:
    """Version and digest of every roll that the audit names."""
    return [
        (version, str(entry.facts.get("roll")))
        for entry in entries
        if entry.event in _CHANGES and isinstance(version := entry.facts.get("version"), int)
    ]
