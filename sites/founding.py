"""Founding a site: a hospital's folder, with keys that are made in it and never leave it.

`site.json` is written last; a folder without it is no site's. An init that was interrupted leaves
keys that nobody knows: they are not used again, and the folder is to be deleted.
"""

from __future__ import annotations

from pydantic import ValidationError

from fedseg.errors import DataError
from fedseg.security.identity import COORDINATOR, SiteIdentity, make_request
from fedseg.security.keys import ReceivingKey, SigningKey, save_key
from fedseg.security.nodekeys import make_node_key
from sites.audit import record
from sites.folder import SiteFolder, SiteRecord
from sites.notes import PUBLIC_FILE, write_note
from sites.policy import TEMPLATE
from sites.rights import OPEN_FOLDER, PRIVATE_FOLDER, SHARED_FOLDER, as_owner_of, make_folder


def found(folder: SiteFolder, name: str, now: str, passphrase: bytes | None = None) -> SiteIdentity:
    """Make a site's folder.

    Args:
        folder: new, or with nothing of a site in it.
        name: under which the site asks to be enrolled.
        now: ISO 8601, UTC.
        passphrase: encrypts the trainer's keys; Flower's node key has none, because Flower could
            not open it.

    Raises:
        DataError: the folder is a site's already, or the name cannot be one.
        StorageError: it cannot be written.
    """
    _require_new(folder)
    site = _record(name, now)
    signing, receiving = SigningKey.generate(), ReceivingKey.generate()
    make_folder(folder.path, OPEN_FOLDER)
    seen_by_one = (folder.trainer, folder.relay, folder.studies, folder.cache, folder.models)
    for path in (*seen_by_one, folder.validations):
        make_folder(path, PRIVATE_FOLDER)
    for path in (folder.run, folder.logs):
        make_folder(path, SHARED_FOLDER)
    with as_owner_of(folder.trainer):
        save_key(folder.signing_key, signing, passphrase)
        save_key(folder.receiving_key, receiving, passphrase)
    with as_owner_of(folder.relay):
        node = make_node_key(folder.node_key)
    write_note(folder.node_public, f"{node}\n".encode(), PUBLIC_FILE)
    identity = SiteIdentity(
        name=name, signing=signing.public.text, sealing=receiving.public.text, node=node
    )
    write_note(folder.request, make_request(identity, signing, now), PUBLIC_FILE)
    write_note(folder.policy, TEMPLATE.encode(), PUBLIC_FILE)
    record(folder, signing, "initialised", lambda: now, site=name, fingerprint=identity.fingerprint)
    write_note(folder.site, site, PUBLIC_FILE)
    return identity


def _require_new(folder: SiteFolder) -> None:
    """Refuse a folder that is a site's, or was to become one."""
    if folder.site.exists():
        raise DataError(
            f"{folder.path.name} is the folder of {folder.record.name} already: its keys stay; "
            "name another folder for another site"
        )
    ours = (folder.signing_key, folder.receiving_key, folder.node_key, folder.request)
    if any(path.exists() for path in ours):
        raise DataError(
            f"in {folder.path.name} an init was not finished, or its site.json is lost: bring it "
            "back from a backup, or delete the folder where nobody was sent its request.json"
        )


def _record(name: str, now: str) -> SiteRecord:
    """site.json, of a name that a site can have."""
    try:
        record = SiteRecord(name=name, created=now)
    except ValidationError:
        record = None
    if record is None or name.lower() == COORDINATOR:
        raise DataError(
            "a site is named in letters, digits, '.', '_' and '-', at most 64, and not "
            f"{COORDINATOR!r}; not {name[:80]!r}"
        )
    return record
