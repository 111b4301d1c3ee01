"""An envelope opens for whom it was sealed, once it is seen to be what its sender signed."""

from __future__ import annotations

import hashlib
import io
import tracemalloc
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from small_parties import PLAN, ROLL, STUDY, Party, answer_envelope, task_envelope

from fedseg.errors import TrustError
from fedseg.security.documents import from_text
from fedseg.security.envelope import (
    MAGIC,
    EnvelopeHeader,
    envelope_limit,
    open_bytes,
    open_envelope,
    read_header,
    seal_bytes,
    seal_envelope,
)
from fedseg.security.envelope import _info as info
from fedseg.security.keys import SealingKey
from fedseg.security.stream import CHUNK_BYTES, decrypt, encrypt, sealed_bytes

COORDINATOR, A, B = Party("coordinator"), Party("hospital_a"), Party("hospital_b")
PLAIN = b"the model of round 3" * 10
ROOM = 10**8


def open_task(data: bytes, reader: Party = A, **changes: Any) -> tuple[EnvelopeHeader, bytes]:
    """Open a task as a site does."""
    fields = {
        "kind": "task",
        "study": STUDY,
        "signer": COORDINATOR.signing.public,
        "recipient": reader.name,
        "key": reader.receiving,
        "max_bytes": ROOM,
    }
    return open_bytes(data, **{**fields, **changes})


def test_a_task_opens_for_each_of_its_recipients() -> None:
    data = task_envelope(PLAIN, COORDINATOR, A, B)
    for reader in (A, B):
        header, plain = open_task(data, reader)
        assert plain == PLAIN
        assert (header.plan, header.roll, header.size) == (PLAN, ROLL, len(PLAIN))
        assert header.about == hashlib.sha256(PLAIN).hexdigest()
        assert header.reply_to == COORDINATOR.receiving.public.text
        assert header == read_header(io.BytesIO(data), max_bytes=ROOM)
    assert PLAIN[:20] not in data


def test_an_answer_goes_back_to_the_key_that_the_task_named() -> None:
    task, _ = open_task(task_envelope(PLAIN, COORDINATOR, A))
    assert task.reply_to is not None
    reply_to = {"coordinator": SealingKey.from_text(task.reply_to)}
    data = answer_envelope(b"delta", A, COORDINATOR, about=task.about, recipients=reply_to)
    header, plain = open_bytes(
        data,
        kind="answer",
        study=STUDY,
        signer=A.signing.public,
        recipient="coordinator",
        key=COORDINATOR.receiving,
        max_bytes=ROOM,
    )
    assert (header.sender, header.about, plain) == ("hospital_a", task.about, b"delta")


def test_the_layout_is_what_the_documentation_says() -> None:
    """Opened by hand, with the library's primitives alone."""
    plain = bytes(CHUNK_BYTES) + b"tail"
    data = task_envelope(plain, COORDINATOR, A)
    assert data[:8] == MAGIC
    end = 12 + int.from_bytes(data[8:12], "big")
    header = EnvelopeHeader.model_validate_json(data[12:end])
    COORDINATOR.signing.public.verify("envelope", data[12:end], data[end : end + 64])
    chunks = data[end + 64 :]
    assert hashlib.sha256(chunks).hexdigest() == header.ciphertext
    blank = header.model_copy(update={"keys": {}, "ciphertext": "0" * 64})
    wrapped = from_text(header.keys["hospital_a"], None, "key")
    cipher = ChaCha20Poly1305(A.receiving.unwrap(wrapped, info(blank, "hospital_a")))
    first, second = chunks[: CHUNK_BYTES + 16], chunks[CHUNK_BYTES + 16 :]
    assert cipher.decrypt(bytes(12), first, None) == plain[:CHUNK_BYTES]
    assert cipher.decrypt(bytes(10) + b"\x01\x01", second, None) == b"tail"


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_any_size_comes_back(size: int) -> None:
    plain = bytes(size)
    data = task_envelope(plain, COORDINATOR, A)
    assert open_task(data)[1] == plain
    start = 12 + int.from_bytes(data[8:12], "big") + 64
    assert len(data) - start == sealed_bytes(size)
    assert len(data) <= envelope_limit(size)


def test_the_header_is_as_long_before_as_after() -> None:
    sink = io.BytesIO(b"before" + bytes(10))
    sink.seek(6)
    digest = hashlib.sha256(PLAIN).hexdigest()
    fields: dict[str, Any] = {"kind": "task", "study": STUDY, "plan": PLAN, "roll": ROLL}
    fields |= {"about": digest, "sender": "coordinator", "recipients": {"a": A.receiving.public}}
    fields |= {"signer": COORDINATOR.signing, "size": len(PLAIN)}
    seal_envelope(sink, [PLAIN[:7], PLAIN[7:]], **fields)
    assert sink.tell() == len(sink.getvalue())
    sink.write(b"after")
    written = sink.getvalue()
    assert written.startswith(b"before" + MAGIC)
    assert open_task(written[6:-5], recipient="a")[1] == PLAIN


def test_pieces_of_any_kind_and_shape_are_sealed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mapped")
    array = np.arange(CHUNK_BYTES // 3, dtype=np.float64).reshape(-1, 1)
    with (tmp_path / "file").open("r+b") as file, mmap(file.fileno(), 0) as mapped:
        empty = np.zeros((0, 2)).data
        pieces = [b"a", empty, bytearray(b"b"), mapped, array.data, b"", memoryview(b"c")]
        plain = b"".join(bytes(piece) for piece in pieces)
        sink = io.BytesIO()
        encrypt(sink, pieces, len(plain), b"k" * 32)
    opened = io.BytesIO()
    sink.seek(0)
    assert decrypt(sink, opened, len(plain), b"k" * 32) == hashlib.sha256(plain).hexdigest()
    assert opened.getvalue() == plain == b"ab" + b"mapped" + array.tobytes() + b"c"


@pytest.mark.parametrize("announced", [0, len(PLAIN) - 1, len(PLAIN) + 1, 3 * CHUNK_BYTES])
def test_a_wrong_size_is_not_sealed(announced: int) -> None:
    with pytest.raises(ValueError, match="announced"):
        encrypt(io.BytesIO(), [PLAIN], announced, b"k" * 32)


def test_misuse_is_not_sealed() -> None:
    with pytest.raises(ValueError, match="SHA-256 of the task"):
        task_envelope(PLAIN, COORDINATOR, A, about="c" * 64)
    with pytest.raises(ValueError, match="recipients"):
        task_envelope(PLAIN, COORDINATOR)
    with pytest.raises(ValueError, match="sends tasks"):
        task_envelope(PLAIN, COORDINATOR, A, sender="hospital_b")
    with pytest.raises(ValueError, match="sends tasks"):
        answer_envelope(PLAIN, A, COORDINATOR, sender="coordinator")
    with pytest.raises(ValueError, match="not answered"):
        answer_envelope(PLAIN, A, COORDINATOR, reply_to=A.receiving.public)
    with pytest.raises(ValueError, match="recipients"):
        task_envelope(b"", COORDINATOR, recipients=dict.fromkeys(map(str, range(257))))


def test_one_content_key_serves_one_message() -> None:
    first, second = (task_envelope(PLAIN, COORDINATOR, A) for _ in range(2))
    assert len(first) == len(second)
    assert first[-len(PLAIN) :] != second[-len(PLAIN) :]


def test_sealing_and_opening_hold_a_few_chunks_however_long_the_message(tmp_path: Path) -> None:
    size = 24 * CHUNK_BYTES
    piece = bytes(CHUNK_BYTES)
    digest = hashlib.sha256(bytes(size)).hexdigest()

    def pieces() -> Iterator[bytes]:
        for _ in range(size // CHUNK_BYTES):
            yield piece

    tracemalloc.start()
    try:
        with (tmp_path / "envelope").open("wb") as sink:
            seal_envelope(
                sink,
                pieces(),
                kind="task",
                study=STUDY,
                plan=PLAN,
                roll=ROLL,
                about=digest,
                sender="coordinator",
                recipients={"hospital_a": A.receiving.public},
                signer=COORDINATOR.signing,
                size=size,
            )
        with (tmp_path / "envelope").open("rb") as source, (tmp_path / "plain").open("wb") as sink:
            open_envelope(
                source,
                sink,
                kind="task",
                study=STUDY,
                signer=COORDINATOR.signing.public,
                recipient="hospital_a",
                key=A.receiving,
                max_bytes=size,
            )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "plain").stat().st_size == size
    assert peak < 6 * CHUNK_BYTES


def test_bytes_and_files_agree() -> None:
    data = seal_bytes(
        PLAIN,
        kind="answer",
        study=STUDY,
        plan=PLAN,
        roll=ROLL,
        about="c" * 64,
        sender="hospital_a",
        recipients={"coordinator": COORDINATOR.receiving.public},
        signer=A.signing,
    )
    with pytest.raises(TrustError, match="expected the task"):
        open_task(data, signer=A.signing.public)
