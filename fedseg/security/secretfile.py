"""A secret on disk: for its owner alone, written once, behind a passphrase where one is set.

The file appears whole or not at all and never replaces another unless that is asked for. With a
passphrase the content is encrypted by ChaCha20-Poly1305 (RFC 8439) under a key that Argon2id
derives with the second choice of RFC 9106 (3 passes, 64 MiB, 4 lanes): PKCS8 as most libraries
write it stretches a passphrase for a quarter of a millisecond, Argon2id for a tenth of a second
and 64 MiB a guess. The cost is fixed by the format, so no file can ask for less or for the whole
memory.
"""

from __future__ import annotations

import base64
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from pydantic import Field

from fedseg.durable import make_folder, sync_folder
from fedseg.errors import DataError, StorageError, TrustError
from fedseg.frozen import Frozen
from fedseg.security.documents import open_document

MAX_SECRET_BYTES = 64 * 1024
OWNER_ONLY = 0o600
_SALT_BYTES = 16
_NONCE = bytes(12)  # the salt, and with it the key, is new for every file
_FORMAT = b"fedseg-locked/1"


class _Locked(Frozen):
    """A secret behind a passphrase."""

    format: Literal["fedseg-locked/1"] = "fedseg-locked/1"
    salt: Annotated[str, Field(max_length=64)]
    sealed: Annotated[str, Field(max_length=2 * MAX_SECRET_BYTES)]


def lock(secret: bytes, passphrase: bytes | None) -> bytes:
    """The secret encrypted under the passphrase; unchanged where there is none.

    Raises:
        ValueError: the passphrase is empty.
    """
    if passphrase is None:
        return secret
    salt = secrets.token_bytes(_SALT_BYTES)
    sealed = ChaCha20Poly1305(_stretched(passphrase, salt)).encrypt(_NONCE, secret, _FORMAT)
    locked = _Locked(salt=base64.b64encode(salt).decode(), sealed=base64.b64encode(sealed).decode())
    return locked.canonical_bytes + b"\n"


def unlock(data: bytes, passphrase: bytes | None, what: str = "the key") -> bytes:
    """What `lock` was given; data that are not locked come back as they are.

    Raises:
        TrustError: the passphrase is missing or wrong, or the data are damaged.
    """
    if not is_locked(data):
        return data
    if passphrase is None:
        raise TrustError(
            f"{what} is protected by a passphrase: name the file that holds it in "
            "FEDSEG_PASSPHRASE_FILE, or run the command in a terminal to be asked"
        )
    locked = open_document(data, _Locked, max_bytes=4 * MAX_SECRET_BYTES, what=what)
    try:
        salt = base64.b64decode(locked.salt, validate=True)
        sealed = base64.b64decode(locked.sealed, validate=True)
        return ChaCha20Poly1305(_stretched(passphrase, salt)).decrypt(_NONCE, sealed, _FORMAT)
    except (InvalidTag, ValueError):
        raise TrustError(f"the passphrase of {what} is wrong, or the file is damaged") from None


def is_locked(data: bytes) -> bool:
    """Whether the data need a passphrase."""
    return data.startswith(b'{"format":"' + _FORMAT + b'"')


def write_secret(path: Path, secret: bytes, *, replace: bool = False) -> None:
    """Write a file that its owner alone can read, whole or not at all.

    The folder is made, mode 0700, where there is none.

    Raises:
        DataError: there is a file already, and it is not to be replaced.
        StorageError: the disk is full or the place cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        make_folder(path.parent, mode=0o700)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            draft.replace(path)
        else:
            _name(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path.name}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            draft.unlink()


def read_secret(path: Path) -> bytes:
    """Read a file that nobody but its owner can read.

    Raises:
        TrustError: missing, oversized, or others may read it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise TrustError(f"cannot read the key {path.name}: {error.strerror}") from None
    if mode & ~OWNER_ONLY:
        raise TrustError(
            f"{path.name} has mode {mode:04o}, so that others than its owner may use it: "
            f"expected 0600; if nobody did, run chmod 600 on it, else make new keys"
        )
    if len(data) > MAX_SECRET_BYTES:
        raise TrustError(f"{path.name} is larger than {MAX_SECRET_BYTES} bytes: that is no key")
    return data


def _stretched(passphrase: bytes, salt: bytes) -> bytes:
    """The key of a passphrase."""
    if not passphrase:
        raise ValueError("an empty passphrase protects nothing")
    return Argon2id(salt=salt, length=32, iterations=3, lanes=4, memory_cost=64 * 1024).derive(
        passphrase
    )


def _name(draft: Path, path: Path) -> None:
    """Give a file its name, in one step that fails where there is one of that name."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise DataError(
            f"{path.name} is there already and is not overwritten: keys cannot be made again; "
            "move it away if it is no longer needed"
        ) from None
