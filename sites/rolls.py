"""Which list of sites this hospital accepts, and what becomes of another one.

A list (roll) counts if the study's pinned key signed it. Its version never goes back and a version
has one content. Sites that left are accepted as they come; a site that is new, or has new keys, was
not among those that the hospital approved: the list is put beside the accepted one, and nothing is
worked on until `plan approve`, unless the approval says that later sites need none.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime

from fedseg.errors import DataError, TrustError
from fedseg.security.identity import MAX_ROLL_BYTES, SignedRoll, SiteIdentity, open_roll
from fedseg.security.keys import VerifyKey
from sites.approval import Approval
from sites.folder import SiteFolder
from sites.notes import write_note


class RosterError(TrustError):
    """The list of sites is not the accepted one; the hospital or the consortium must act."""


def accepted_roll(folder: SiteFolder, study: str, key: VerifyKey) -> SignedRoll:
    """The accepted list of a study.

    Raises:
        DataError: it cannot be read.
        TrustError: it was edited.
    """
    path = folder.roll(study)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_ROLL_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {path.name} of {study}: {error.strerror}") from None
    return open_roll(data, key, study)


def require_accepted(roll: SignedRoll, digest: str, now: datetime) -> None:
    """Check that a task was made for the accepted list, which has not expired.

    Raises:
        RosterError: it was not, or it has.
    """
    if digest != roll.roll.digest:
        raise RosterError("the task was made for another list of sites than the accepted one")
    if now > roll.roll.expires:
        raise RosterError(
            f"the list of sites expired on {roll.roll.valid_until}: the consortium must renew it"
        )


def take_roll(
    folder: SiteFolder,
    study: str,
    offered: SignedRoll,
    *,
    key: VerifyKey,
    own: SiteIdentity,
    approval: Approval | None,
) -> SignedRoll:
    """Accept the list that came with a task, or put it aside for the hospital to look at.

    Args:
        offered: as it came; unverified.
        key: the study's pinned key.
        own: this site, which must be on the list.
        approval: what the hospital approved; before that, any list is taken, since approving
            shows it.

    Raises:
        TrustError: not signed by the study's key, or of another study.
        RosterError: older than the accepted one, without this site, or with sites that the
            hospital has not approved.
    """
    offered.verify(key, study)
    current = accepted_roll(folder, study, key)
    new, old = offered.roll, current.roll
    if new.digest == old.digest:
        return current
    if new.version <= old.version:
        raise RosterError(
            f"version {new.version} of the list of sites came, version {old.version} is accepted: "
            "it never goes back"
        )
    if new.site(own.name) != own:
        raise RosterError("this site is not on the new list of sites, or with other keys")
    added = new.added_since(old)
    if added and approval is not None and not approval.any_later_sites:
        write_note(folder.offered_roll(study), offered.canonical_bytes)
        raise RosterError(
            f"new on the list of sites: {', '.join(added)}; look at it and accept it with "
            f"`fedseg-site plan approve {study}`"
        )
    write_note(folder.roll(study), offered.canonical_bytes)
    with suppress(OSError):
        folder.offered_roll(study).unlink()
    return offered
