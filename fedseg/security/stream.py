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


def encrypt(sink: BinaryIO, source: Iterable[Buffer], size: int, key: bytes) -> tuple[str, str]:
    """Write the chunks of a plaintext that comes in pieces of any size.

    Returns:
        SHA-256 of the plaintext and of the chunks as they stand, hexadecimal.

    Raises:
        ValueError: the source has not `size` bytes.
    """
    cipher, plain, sealed = ChaCha20Poly1305(key), hashlib.sha256(), hashlib.sha256()
    done, last = 0, _count(size) - 1
    for number, piece in enumerate(_pieces(source)):
        done += len(piece)
        if number > last or done != min(size, (number + 1) * CHUNK_BYTES):
            raise ValueError(f"the message has not the {size} bytes that were announced")
        chunk = cipher.encrypt(_nonce(number, number == last), piece, None)
        plain.update(piece)
        sealed.update(chunk)
        sink.write(chunk)
    if done != size:
        raise ValueError(f"the message has {done} bytes, {size} were announced")
    return plain.hexdigest(), sealed.hexdigest()


def decrypt(source: BinaryIO, sink: BinaryIO, size: int, key: bytes) -> str:
    """Write the plaintext of chunks, each once it is authentic.

    Returns:
        SHA-256 of the plaintext, hexadecimal.

    Raises:
        TrustError: cut, changed, or under another key; what was written is void.
    """
    if len(key) != KEY_BYTES:
        raise TrustError("the content key has not the length of one")
    cipher, plain, last = ChaCha20Poly1305(key), hashlib.sha256(), _count(size) - 1
    try:
        for number, chunk in enumerate(_chunks(source, size)):
            piece = cipher.decrypt(_nonce(number, number == last), chunk, None)
            plain.update(piece)
            sink.write(piece)
    except InvalidTag:
        raise TrustError("a chunk of the message does not open: what was written is void") from None
    return plain.hexdigest()


def sealed_digest(source: BinaryIO, size: int) -> str:
    """SHA-256 of the chunks of a plaintext of `size` bytes, hexadecimal; nothing is decrypted.

    Raises:
        TrustError: there are fewer.
    """
    sealed = hashlib.sha256()
    for chunk in _chunks(source, size):
        sealed.update(chunk)
    return sealed.hexdigest()


def sealed_bytes(size: int) -> int:
    """How many bytes the chunks of a plaintext have."""
    return size + TAG_BYTES * _count(size)


def exactly(source: BinaryIO, size: int) -> bytes:
    """So many bytes of a source.

    Raises:
        TrustError: it ends before.
    """
    data = source.read(size)
    while len(data) < size:
        more = source.read(size - len(data))
        if not more:
            raise TrustError("the message ends before its end: it was cut on its way")
        data += more
    return data


def _pieces(source: Iterable[Buffer]) -> Iterator[memoryview | bytearray]:
    """The plaintext in chunks, the last one shorter; one empty chunk where there is nothing.

    A piece that holds whole chunks is not copied.
    """
    rest, any_yet = bytearray(), False
    for buffer in source:
        view = memoryview(buffer)
        if not view.nbytes:
            continue  # such a view cannot be cast
        view = view.cast("B")
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
