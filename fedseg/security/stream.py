"""A long plaintext as authentic chunks: nobody can change, reorder, drop or add one.

Chunks of 1 MiB are encrypted by ChaCha20-Poly1305 (RFC 8439), and their nonces are STREAM's (Hoang,
Reyhanitabar, Rogaway and Vizar, CRYPTO 2015): a counter and a flag that only the last chunk has. A
key serves one plaintext, so the nonces need no random part. The length of the plaintext is known on
both sides beforehand and says how many chunks there are; memory holds one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from mmap import mmap
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedseg.errors import TrustError

CHUNK_BYTES = 1024 * 1024
TAG_BYTES = 16
KEY_BYTES = 32

Buffer = bytes | bytearray | memoryview | mmap


def encrypt(
    sink: BinaryIO, source: Iterable[Buffer], size: int, cipher: ChaCha20Poly1305
) -> tuple[str, str]:
    """Write the chunks; the digests of plaintext and ciphertext."""
    plain, sealed = hashlib.sha256(), hashlib.sha256()
    done, last = 0, _count(size) - 1
    for number, piece in enumerate(_pieces(source)):
        if number > last or len(piece) != min(CHUNK_BYTES, size - done):
            raise ValueError(f"the message is not of the {size} bytes that were announced")
        chunk = cipher.encrypt(_nonce(number, number == last), piece, None)
        plain.update(piece)
        sealed.update(chunk)
        sink.write(chunk)
        done += len(piece)
    if done != size:
        raise ValueError(f"the message has {done} bytes, {size} were announced")
    return plain.hexdigest(), sealed.hexdigest()


def decrypt(source: BinaryIO, sink: BinaryIO, size: int, content_key: bytes) -> str:
    """Write the plaintext; its digest."""
    if len(content_key) != _KEY_BYTES:
        raise TrustError("the content key has not the length of one")
    cipher, plain, last = ChaCha20Poly1305(content_key), hashlib.sha256(), _count(size) - 1
    try:
        for number, chunk in enumerate(_chunks(source, size)):
            piece = cipher.decrypt(_nonce(number, number == last), chunk, None)
            plain.update(piece)
            sink.write(piece)
    except InvalidTag:
        raise TrustError("a chunk of the message does not open: what was written is void") from None
    return plain.hexdigest()


def _pieces(source: Iterable[Buffer]) -> Iterator[memoryview | bytearray]:
    """The plaintext in chunks, the last one shorter; one empty chunk where there is nothing.

    A piece that holds whole chunks is not copied.
    """
    rest, any_yet = bytearray(), False
    for buffer in source:
        view = memoryview(buffer).cast("B")
        while len(rest) + len(view) >= CHUNK_BYTES:
            taken = CHUNK_BYTES - len(rest)
            yield rest + view[:taken] if rest else view[:taken]
            any_yet, rest, view = True, bytearray(), view[taken:]
        rest += view
    if rest or not any_yet:
        yield rest


def _chunks(source: BinaryIO, size: int) -> Iterator[bytes]:
    """The ciphertext in chunks, as many as the plaintext's size asks for."""
    for number in range(_count(size)):
        left = size - number * CHUNK_BYTES
        yield exactly(source, min(CHUNK_BYTES, left) + TAG_BYTES)


def _count(size: int) -> int:
    """How many chunks a plaintext has; an empty one has one, so that its end is authentic too."""
    return max(1, -(-size // CHUNK_BYTES))


def _nonce(number: int, last: bool) -> bytes:
    """STREAM's nonce of a chunk; the key is new for every message, so no prefix is needed."""
    return number.to_bytes(11, "big") + (b"\x01" if last else b"\x00")


def _exactly(source: BinaryIO, size: int) -> bytes:
    """So many bytes, or the message is cut."""
    data = source.read(size)
    while len(data) < size:
        more = source.read(size - len(data))
        if not more:
            raise TrustError("the message ends before its end: it was cut on its way")
        data += more
    return data
