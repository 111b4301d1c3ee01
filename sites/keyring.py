"""A site's own keys: what it is called and known by, and its signature, asked for when needed."""

from __future__ import annotations

from fedseg.errors import DataError, TrustError
from fedseg.security.identity import SiteIdentity, open_request
from fedseg.security.keys import SigningKey, is_encrypted, load_signing_key
from fedseg.shell import passphrase
from sites.folder import SiteFolder
from sites.notes import MAX_NOTE_BYTES


def own_identity(folder: SiteFolder) -> SiteIdentity:
    """Name and public keys of this site, from the request that it signed itself.

    Raises:
        DataError: this is no SITEDIR, or the request cannot be read.
        TrustError: the request was changed, or is another site's.
    """
    name = folder.record.name
    try:
        with folder.request.open("rb") as stream:
            data = stream.read(MAX_NOTE_BYTES)
    except OSError as error:
        raise DataError(
            f"cannot read {folder.request.name} ({error.strerror}): bring it back from a backup"
        ) from None
    identity = open_request(data).identity
    if identity.name != name:
        raise TrustError(
            f"{folder.request.name} is of {identity.name}, but this site is {name}: bring the "
            "right file back from a backup"
        )
    return identity


def open_signing_key(folder: SiteFolder) -> SigningKey:
    """The key that signs for this site; its passphrase is asked for where it has one.

    Raises:
        TrustError: missing, damaged, not this site's, readable by others, or a wrong passphrase.
    """
    path = folder.signing_key
    secret = passphrase("Passphrase of this site's keys") if is_encrypted(path) else None
    key = load_signing_key(path, secret)
    if key.public.text != own_identity(folder).signing:
        raise TrustError(
            f"{path.name} is not the key that {folder.request.name} names: bring both back from "
            "the same backup"
        )
    return key
