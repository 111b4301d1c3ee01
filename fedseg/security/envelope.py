"""One sealed message, from file to file, however large: its sender shows, only its readers read it.

    8 bytes magic | header length, u32 | header, JSON | 64 bytes signature of the header | chunks

A content key, new for every message, encrypts the chunks (`fedseg.security.stream`). It is wrapped
once for each recipient by HPKE, bound to the rest of the header and the recipient's name: a model
for twenty hospitals is encrypted once. The sender signs the header, and with it the digest of all
chunks, what the message is about and every wrapped key.

Opening goes in this order: bounds, the signature by the key that the caller expects, kind and
study, the digest of the ciphertext, and only then is anything decrypted. A task's plaintext must
also be the one that its header names: ChaCha20-Poly1305 does not commit to its key, so without that
check two recipients could be given one ciphertext that opens to two tasks.

Both directions hold one chunk in memory. What is not hidden: who talks to whom, when, of which
study, and how much.
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, BinaryIO, Literal, Self

from pydantic import Field, model_validator

from fedseg.errors import TrustError
from fedseg.frozen import Digest, Frozen, Name, SiteName
from fedseg.security.documents import from_text, open_document, to_text
from fedseg.security.identity import COORDINATOR, MAX_SITES
from fedseg.security.keys import SIGNATURE_BYTES, ReceivingKey, SealingKey, SigningKey, VerifyKey
from fedseg.security.stream import (
    KEY_BYTES,
    Buffer,
    decrypt,
    encrypt,
    exactly,
    sealed_bytes,
    sealed_digest,
)

MAGIC = b"fedseg\x01\n"
MAX_HEADER_BYTES = 1024 * 1024
_LENGTH_BYTES = 4
_ENVELOPE = "envelope"
_NO_DIGEST = "0" * 64

Kind = Literal["task", "answer"]


class EnvelopeHeader(Frozen):
    """What stands outside: all that a relay can see, and all that is signed.

    Attributes:
        plan: digest of the study plan.
        roll: digest of the roll that the sender goes by.
        about: a task's own digest; in an answer, the digest of the task that it answers.
        sender: "coordinator" or the site's name.
        keys: recipient -> the content key, wrapped, base64.
        reply_to: in a task, the key that answers are to be sealed for.
        size: bytes of plaintext.
        ciphertext: SHA-256 of all chunks as they stand.
    """

    format: Literal["fedseg-envelope/1"] = "fedseg-envelope/1"
    kind: Kind
    study: Name
    plan: Digest
    roll: Digest
    about: Digest
    sender: SiteName
    keys: Annotated[dict[SiteName, Annotated[str, Field(max_length=2048)]], Field(max_length=256)]
    reply_to: Annotated[str, Field(max_length=2048)] | None = None
    size: Annotated[int, Field(ge=0, lt=2**48)]
    ciphertext: Digest

    @model_validator(mode="after")
    def _sender_fits(self) -> Self:
        if (self.kind == "task") != (self.sender == COORDINATOR):
            raise ValueError("the coordinator sends tasks, and sites send answers")
        if self.kind == "answer" and self.reply_to is not None:
            raise ValueError("an answer is not answered")
        return self


def seal_envelope(
    sink: BinaryIO,
    source: Iterable[Buffer],
    *,
    kind: Kind,
    study: str,
    plan: str,
    roll: str,
    about: str,
    sender: str,
    recipients: Mapping[str, SealingKey],
    signer: SigningKey,
    size: int,
    reply_to: SealingKey | None = None,
) -> EnvelopeHeader:
    """Encrypt a message for its recipients, sign it and write it.

    The header is written last, in the room left for it: it is as long with the digest as without.

    Args:
        sink: where the envelope goes; it must be able to seek.
        source: the plaintext, in pieces of any size.
        size: bytes of the plaintext in all.
        recipients: by name; each can open the whole.
        signer: the sender's key.

    Returns:
        The header as it was signed. The other arguments are its fields.

    Raises:
        ValueError: the source is not `size` bytes, a task's plaintext is not what `about` says, or
            there is no recipient.
        TrustError: a recipient's key is none.
    """
    if not 0 < len(recipients) <= MAX_SITES:
        raise ValueError(f"an envelope has 1 to {MAX_SITES} recipients, not {len(recipients)}")
    content_key = secrets.token_bytes(KEY_BYTES)
    blank = EnvelopeHeader(
        kind=kind,
        study=study,
        plan=plan,
        roll=roll,
        about=about,
        sender=sender,
        keys={},
        reply_to=None if reply_to is None else reply_to.text,
        size=size,
        ciphertext=_NO_DIGEST,
    )
    wrapped = {
        name: to_text(key.wrap(content_key, _info(blank, name))) for name, key in recipients.items()
    }
    header = EnvelopeHeader.model_validate({**blank.model_dump(), "keys": wrapped})
    start = sink.tell()
    _write_head(sink, header, bytes(SIGNATURE_BYTES))
    plain, cipher = encrypt(sink, source, size, content_key)
    if kind == "task" and plain != about:
        raise ValueError("`about` of a task is the SHA-256 of the task itself")
    header = header.model_copy(update={"ciphertext": cipher})
    end = sink.tell()
    sink.seek(start)
    _write_head(sink, header, signer.sign(_ENVELOPE, header.canonical_bytes))
    sink.seek(end)
    return header


def read_header(source: BinaryIO, *, max_bytes: int) -> EnvelopeHeader:
    """Read what an envelope claims of itself: NOTHING in it is verified, not even the sender.

    Args:
        source: at the envelope's start; where it stands afterwards is not said.
        max_bytes: the largest plaintext that is taken.

    Raises:
        TrustError: not an envelope, or oversized.
    """
    return _read_head(source, max_bytes)[0]


def open_envelope(
    source: BinaryIO,
    sink: BinaryIO,
    *,
    kind: Kind,
    study: str,
    signer: VerifyKey,
    recipient: str,
    key: ReceivingKey,
    max_bytes: int,
) -> EnvelopeHeader:
    """Verify an envelope and write its plaintext.

    Nothing is written before signature and ciphertext are verified. Where this raises later all the
    same (the file was changed meanwhile, or a task is not what it claims), throw the sink away.

    Args:
        source: at the envelope's start, which must end with it; it must be able to seek.
        sink: where the plaintext goes.
        kind: what is expected.
        study: of which study.
        signer: by whom, known beforehand and not from the envelope.
        recipient: our own name among the recipients.
        key: our own key.
        max_bytes: the largest plaintext that is taken.

    Returns:
        The header, verified. That its plan, roll, sender and `about` are the expected ones is for
        the caller to see.

    Raises:
        TrustError: anything is not as it should be.
    """
    header, raw, signature = _read_head(source, max_bytes)
    signer.verify(_ENVELOPE, raw, signature)
    if (header.kind, header.study) != (kind, study):
        raise TrustError(
            f"expected the {kind} of {study!r}, a {header.kind} of {header.study!r} came"
        )
    if recipient not in header.keys:
        raise TrustError(f"the {kind} was not sealed for {recipient!r}")
    start = source.tell()
    if sealed_digest(source, header.size) != header.ciphertext or source.read(1):
        raise TrustError(f"the {kind} was changed or cut on its way: its content is not as signed")
    wrapped = from_text(header.keys[recipient], None, "the content key")
    blank = header.model_copy(update={"keys": {}, "ciphertext": _NO_DIGEST})
    content_key = key.unwrap(wrapped, _info(blank, recipient))
    source.seek(start)
    plain = decrypt(source, sink, header.size, content_key)
    if kind == "task" and plain != header.about:
        raise TrustError("the task is not the one that its envelope names")
    return header


def seal_bytes(plain: bytes, **fields: Any) -> bytes:
    """`seal_envelope` for what is small enough to hold: its arguments but sink, source and size."""
    sink = io.BytesIO()
    seal_envelope(sink, [plain], size=len(plain), **fields)
    return sink.getvalue()


def open_bytes(data: bytes, **expected: Any) -> tuple[EnvelopeHeader, bytes]:
    """`open_envelope` for what is small enough to hold: its arguments but source and sink."""
    sink = io.BytesIO()
    header = open_envelope(io.BytesIO(data), sink, **expected)
    return header, sink.getvalue()


def envelope_limit(max_bytes: int) -> int:
    """The largest envelope in bytes whose plaintext has at most `max_bytes`."""
    head = len(MAGIC) + _LENGTH_BYTES + MAX_HEADER_BYTES + SIGNATURE_BYTES
    return head + sealed_bytes(max_bytes)


def _write_head(sink: BinaryIO, header: EnvelopeHeader, signature: bytes) -> None:
    """All that stands before the chunks."""
    raw = header.canonical_bytes
    sink.write(MAGIC + len(raw).to_bytes(_LENGTH_BYTES, "big") + raw + signature)


def _read_head(source: BinaryIO, max_bytes: int) -> tuple[EnvelopeHeader, bytes, bytes]:
    """The header, its bytes and the signature, unverified."""
    start = exactly(source, len(MAGIC) + _LENGTH_BYTES)
    length = int.from_bytes(start[len(MAGIC) :], "big")
    if not start.startswith(MAGIC) or length > MAX_HEADER_BYTES:
        raise TrustError("what came is not an envelope of fedseg")
    raw = exactly(source, length)
    what = "the envelope's header"
    header = open_document(raw, EnvelopeHeader, max_bytes=MAX_HEADER_BYTES, what=what)
    if header.size > max_bytes:
        raise TrustError(f"a message of {header.size} bytes came, at most {max_bytes} are allowed")
    return header, raw, exactly(source, SIGNATURE_BYTES)


def _info(blank: EnvelopeHeader, recipient: str) -> bytes:
    """What a wrapped key is bound to: the header without keys and ciphertext, and the recipient."""
    return hashlib.sha256(blank.canonical_bytes).digest() + recipient.encode()
