"""Taking part in a study, and no longer.

A bundle brings the key that signed it, so it proves nothing until its fingerprint was compared by
telephone; then its study key is pinned under studies/NAME, and from that moment only that key
counts. A later bundle of the same study may bring another address, CA or list of sites, never
another key or plan. bundle.json is written last and deleted first: without it nothing is served.
"""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedseg.errors import DataError, StorageError, TrustError
from fedseg.security.identity import MAX_BUNDLE_BYTES, Bundle, SiteIdentity, open_bundle
from fedseg.security.keys import SigningKey, VerifyKey
from sites.approval import approved
from sites.audit import record, utc_now
from sites.folder import UNIX_TRAINER, Link, SiteFolder
from sites.keyring import own_identity
from sites.notes import PUBLIC_FILE, write_note
from sites.rights import as_owner_of, make_folder
from sites.rolls import RosterError, accepted_roll, take_roll

_PORTS = range(20000, 32000)


@dataclass(frozen=True)
class Offer:
    """A bundle that holds for this site, beside what was pinned before.

    Attributes:
        data: the bytes as they came.
        pinned: the bundle that was joined before, or None.
    """

    data: bytes
    bundle: Bundle
    own: SiteIdentity
    pinned: Bundle | None

    @property
    def changes(self) -> tuple[str, ...]:
        """What is other than what was pinned, in words; empty where nothing was pinned."""
        if self.pinned is None:
            return ()
        new, old = self.bundle, self.pinned
        named = {
            f"address {old.address} -> {new.address}": new.address != old.address,
            "certificate authority": new.ca != old.ca,
            f"list of sites, version {new.roll.roll.version}": new.roll != old.roll,
            f"Flower {old.flower} -> {new.flower}": new.flower != old.flower,
        }
        return tuple(text for text, changed in named.items() if changed)

    @property
    def to_compare(self) -> bool:
        """Whether the fingerprint is another one than was compared before."""
        return self.pinned is None or self.pinned.fingerprint != self.bundle.fingerprint


def pinned_bundle(folder: SiteFolder, study: str) -> Bundle:
    """The bundle of a study as it was pinned.

    Raises:
        DataError: the study was not joined, or the file cannot be read.
        TrustError: the file was edited, or is another site's.
    """
    folder.require_study(study)
    return open_bundle(_read(folder.bundle(study)), own_identity(folder))


def open_offer(folder: SiteFolder, path: Path) -> Offer:
    """Read a bundle file and hold it against what this site is and has pinned.

    Raises:
        DataError: the file cannot be read.
        TrustError: it is no bundle for this site, or of a joined study under another key or plan.
    """
    own, data = own_identity(folder), _read(path)
    bundle = open_bundle(data, own)
    if bundle.study not in folder.joined:
        return Offer(data, bundle, own, None)
    pinned = pinned_bundle(folder, bundle.study)
    if bundle.study_key != pinned.study_key:
        raise TrustError(
            f"this site has joined {bundle.study} under another study key: call the consortium. "
            "Only if they confirm that the study was founded anew, end the old one with "
            f"`fedseg-site leave {bundle.study}` and join again"
        )
    if bundle.plan.digest != pinned.plan.digest:
        raise TrustError(
            f"this bundle brings another plan than the one that this site joined {bundle.study} "
            "with: a changed plan is a new study; ask for one with another name, or `fedseg-site "
            f"leave {bundle.study}` and join again"
        )
    return Offer(data, bundle, own, pinned)


def join(
    folder: SiteFolder,
    offer: Offer,
    key: SigningKey,
    *,
    trainer: str = UNIX_TRAINER,
    port: int | None = None,
    now: Callable[[], str] = utc_now,
) -> tuple[str, ...]:
    """Pin a study, or take what a later bundle of it brings.

    Args:
        offer: its fingerprint was compared.
        key: signs the audit.
        trainer: where the relay finds the trainer, see `Link`.
        port: of loopback for this relay's Flower processes; None keeps or chooses one.

    Returns:
        Names of sites that are new since the approval; the hospital is to approve them.

    Raises:
        TrustError: the list of sites is older than the accepted one.
        StorageError: the folders cannot be written.
    """
    bundle, study = offer.bundle, offer.bundle.study
    make_folder(folder.study(study))
    make_folder(folder.relay_of(study))
    added = _take_roll(folder, offer)
    write_note(folder.plan(study), bundle.plan.canonical_bytes)
    if port is None and folder.link(study).exists():
        port = folder.link_of(study).port
    link = Link(
        study=study,
        address=bundle.address,
        trainer=trainer,
        port=port or _free_port(folder, study),
    )
    write_note(folder.ca(study), bundle.ca.encode(), PUBLIC_FILE)
    write_note(folder.link(study), link)
    record(
        folder,
        key,
        "joined",
        now,
        study=study,
        plan=bundle.plan.digest,
        roll=bundle.roll.roll.digest,
        fingerprint=bundle.fingerprint,
        digest=hashlib.sha256(offer.data).hexdigest(),
    )
    write_note(folder.bundle(study), offer.data)
    return added


def leave(
    folder: SiteFolder, study: str, key: SigningKey, now: Callable[[], str] = utc_now
) -> tuple[str, ...]:
    """End taking part: nothing of the study is served any more.

    Returns:
        What was deleted, relative to SITEDIR.

    Raises:
        DataError: there is nothing of that study here.
        StorageError: something could not be deleted; call again.
        TrustError: it was left, but the ledger is not what it was: what the study had not spent is
            not free yet.
    """
    places = [path for path in (folder.study(study), folder.relay_of(study)) if path.is_dir()]
    if not places:
        folder.require_study(study)
    record(folder, key, "left", now, study=study)
    try:
        with as_owner_of(folder.studies):
            folder.approval(study).unlink(missing_ok=True)
            folder.bundle(study).unlink(missing_ok=True)
        for path in places:
            with as_owner_of(path.parent):
                shutil.rmtree(path)
    except OSError as error:
        raise StorageError(
            f"not everything of {study} could be deleted ({error.strerror}), but it is no longer "
            "served; run this as the user to whom the folders belong, or as root, again"
        ) from None
    close_register(folder, study, "the site left the study", key, now)
    return tuple(f"{path.relative_to(folder.path)}/" for path in places)


def close_register(
    folder: SiteFolder, study: str, reason: str, key: SigningKey, now: Callable[[], str] = utc_now
) -> bool:
    """End a study in this site's ledger, where there is one with an open register of it.

    Returns:
        Whether there was one.

    Raises:
        TrustError: the ledger is not what it was.
        StorageError: it cannot be written.
    """
    if not folder.ledger.exists():
        return False
    from sites import ledger

    try:
        with as_owner_of(folder.trainer):
            return ledger.close(folder, study, reason, key, now)
    except (TrustError, StorageError) as error:
        raise type(error)(
            f"nothing of {study} is served any more, but its register in the ledger could not be "
            f"closed: {error}; then `fedseg-site ledger close {study}`"
        ) from None


def _take_roll(folder: SiteFolder, offer: Offer) -> tuple[str, ...]:
    """Accept the bundle's list of sites, or put it aside; the names that wait for approval."""
    study, signed = offer.bundle.study, offer.bundle.roll
    if offer.pinned is None or not folder.roll(study).exists():
        write_note(folder.roll(study), signed.canonical_bytes)
        return ()
    if offer.bundle == offer.pinned:  # joined again, to mend what is missing
        return ()
    key = VerifyKey.from_text(offer.pinned.study_key)
    accepted = accepted_roll(folder, study, key).roll
    offered, approval = folder.offered_roll(study), approved(folder, study)
    try:
        take_roll(folder, study, signed, key=key, own=offer.own, approval=approval)
    except RosterError:
        if not offered.exists() or offered.read_bytes() != signed.canonical_bytes:
            raise
        return signed.roll.added_since(accepted)
    return ()


def _read(path: Path) -> bytes:
    """A bundle's bytes, bounded."""
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror}") from None


def _free_port(folder: SiteFolder, study: str) -> int:
    """A loopback port of this site and study that nothing else uses, the same again if it can."""
    taken = {folder.link_of(other).port for other in folder.linked if other != study}
    digest = hashlib.sha256(f"{folder.path}\0{study}".encode()).digest()
    first = int.from_bytes(digest[:4], "big")
    for step in range(len(_PORTS)):
        port = _PORTS[(first + step) % len(_PORTS)]
        if port not in taken and _is_free(port):
            return port
    raise DataError("no port of the loopback interface is free: name one with --port")


def _is_free(port: int) -> bool:
    """Whether nobody listens there at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
