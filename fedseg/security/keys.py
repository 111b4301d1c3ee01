"""Keys of a site and of a study: Ed25519 to sign, a hybrid of ML-KEM and X25519 to receive.

A signature (Ed25519, RFC 8032) covers `fedseg:CONTEXT\\0` before the data, so that what is signed
as one kind of thing is never valid as another. A secret is wrapped for a receiver by HPKE (RFC
9180, base mode) with ML-KEM-768 (FIPS 203) and X25519 together, HKDF and ChaCha20-Poly1305: who
records it today must break both to read it one day. Base mode says nothing of the sender; envelopes
are signed for that. Private keys are written once, mode 0600, and never printed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from pydantic import Field

from fedseg.errors import TrustError
from fedseg.frozen import Frozen
from fedseg.security.documents import from_text, open_document, to_text
from fedseg.security.secretfile import (
    MAX_SECRET_BYTES,
    is_locked,
    lock,
    read_secret,
    unlock,
    write_secret,
)

SIGNATURE_BYTES = 64
_VERIFY_BYTES = 32
_MLKEM_BYTES = 1184
_X25519_BYTES = 32
_SEED_BYTES = 64
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


@dataclass(frozen=True)
class VerifyKey:
    """The public half of a signing key."""

    raw: bytes

    @property
    def text(self) -> str:
        """The key as base64, as identities carry it."""
        return to_text(self.raw)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read a key.

        Raises:
            TrustError: not a key.
        """
        return cls(from_text(text, _VERIFY_BYTES, "the signing key"))

    def verify(self, context: str, data: bytes, signature: bytes) -> None:
        """Accept a signature or raise.

        Raises:
            TrustError: another key signed, or in another context, or the data were changed.
        """
        try:
            key = Ed25519PublicKey.from_public_bytes(self.raw)
            key.verify(signature, _signed(context, data))
        except (InvalidSignature, ValueError):
            raise TrustError(
                f"the signature of the {context} is not by the expected key, "
                "or the content was changed after it was signed: do not go on with it"
            ) from None


class SigningKey:
    """Signs for a study or a site."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._key = Ed25519PrivateKey.from_private_bytes(secret)

    @classmethod
    def generate(cls) -> Self:
        """A new key, from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def public(self) -> VerifyKey:
        """What others verify with."""
        return VerifyKey(self._key.public_key().public_bytes_raw())

    def sign(self, context: str, data: bytes) -> bytes:
        """Sign data as a `context`; 64 bytes."""
        return self._key.sign(_signed(context, data))


@dataclass(frozen=True)
class SealingKey:
    """The public half of a receiving key: the ML-KEM part, then the X25519 part."""

    raw: bytes

    @property
    def text(self) -> str:
        """The key as base64, as identities carry it."""
        return to_text(self.raw)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read a key.

        Raises:
            TrustError: not a key.
        """
        key = cls(from_text(text, _MLKEM_BYTES + _X25519_BYTES, "the sealing key"))
        key._parts()
        return key

    def wrap(self, secret: bytes, info: bytes) -> bytes:
        """Encrypt a short secret for the holder; `info` must be the same when it is unwrapped.

        Raises:
            TrustError: the key is none that anybody could hold.
        """
        try:
            return _SUITE.encrypt(secret, self._parts(), info=info)
        except ValueError:
            raise TrustError("the sealing key is not a key that can be used") from None

    def _parts(self) -> MLKEM768X25519PublicKey:
        """The key as the library has it."""
        try:
            return MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(self.raw[:_MLKEM_BYTES]),
                X25519PublicKey.from_public_bytes(self.raw[_MLKEM_BYTES:]),
            )
        except ValueError:
            raise TrustError("the sealing key is not a key (FIPS 203, section 7.2)") from None


class ReceivingKey:
    """Opens what was sealed for its public half."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._mlkem = MLKEM768PrivateKey.from_seed_bytes(secret[:_SEED_BYTES])
        self._x25519 = X25519PrivateKey.from_private_bytes(secret[_SEED_BYTES:])

    @classmethod
    def generate(cls) -> Self:
        """A new key, from the operating system's randomness."""
        seed = MLKEM768PrivateKey.generate().private_bytes_raw()
        return cls(seed + X25519PrivateKey.generate().private_bytes_raw())

    @property
    def public(self) -> SealingKey:
        """What others seal with."""
        mlkem = self._mlkem.public_key().public_bytes_raw()
        return SealingKey(mlkem + self._x25519.public_key().public_bytes_raw())

    def unwrap(self, blob: bytes, info: bytes) -> bytes:
        """The secret that was wrapped.

        Raises:
            TrustError: wrapped for another key, with another `info`, or damaged.
        """
        try:
            key = MLKEM768X25519PrivateKey(self._mlkem, self._x25519)
            return _SUITE.decrypt(blob, key, info=info)
        except (InvalidTag, ValueError):
            raise TrustError(
                "the content key does not open: it was wrapped for another key or purpose"
            ) from None


class _KeyFile(Frozen):
    """A private key at rest."""

    format: Literal["fedseg-key/1"] = "fedseg-key/1"
    kind: Literal["signing", "receiving"]
    secret: Annotated[str, Field(max_length=256)]


def save_key(path: Path, key: SigningKey | ReceivingKey, passphrase: bytes | None = None) -> None:
    """Write a private key, mode 0600, encrypted where there is a passphrase.

    Raises:
        DataError: there is a file already.
        StorageError: the place cannot be written.
    """
    kind: Literal["signing", "receiving"]
    kind = "signing" if isinstance(key, SigningKey) else "receiving"
    content = _KeyFile(kind=kind, secret=to_text(key._secret))
    write_secret(path, lock(content.canonical_bytes + b"\n", passphrase))


def load_signing_key(path: Path, passphrase: bytes | None = None) -> SigningKey:
    """Read a signing key.

    Raises:
        TrustError: missing, damaged, another kind of key, a wrong or missing passphrase, or a mode
            wider than 0600.
    """
    return SigningKey(_load(path, "signing", _VERIFY_BYTES, passphrase))


def load_receiving_key(path: Path, passphrase: bytes | None = None) -> ReceivingKey:
    """Read a receiving key.

    Raises:
        TrustError: as `load_signing_key`.
    """
    return ReceivingKey(_load(path, "receiving", _SEED_BYTES + _X25519_BYTES, passphrase))


def is_encrypted(path: Path) -> bool:
    """Whether a key file needs a passphrase.

    Raises:
        TrustError: missing, or its mode is wider than 0600.
    """
    return is_locked(read_secret(path))


def fingerprint(*parts: bytes | str) -> str:
    """Eight groups of five digits, from SHA-256, to be read over the telephone.

    About 132 bits: nobody finds a second set of parts with the same digits.
    """
    digest = hashlib.sha256(b"fedseg-fingerprint/1")
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    digits = f"{int.from_bytes(digest.digest(), 'big') % 10**40:040d}"
    return " ".join(digits[i : i + 5] for i in range(0, 40, 5))


def _signed(context: str, data: bytes) -> bytes:
    """What is signed: the context, then the data."""
    if not context or "\0" in context:
        raise ValueError("a context is a short text without zeros")
    return b"fedseg:" + context.encode() + b"\0" + data


def _load(path: Path, kind: str, size: int, passphrase: bytes | None) -> bytes:
    """The secret of a key file of one kind."""
    content = unlock(read_secret(path), passphrase, path.name)
    what = f"the key {path.name}"
    found = open_document(content, _KeyFile, max_bytes=MAX_SECRET_BYTES, what=what)
    if found.kind != kind:
        raise TrustError(f"{what} is a {found.kind} key, a {kind} key was expected")
    return from_text(found.secret, size, what)
