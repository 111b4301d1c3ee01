"""Whatever is sealed comes back, and whatever is done to an envelope shows."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_parties import STUDY, Party, task_envelope

from fedseg.errors import TrustError
from fedseg.security import stream
from fedseg.security.envelope import open_bytes, open_envelope, read_header
from fedseg.security.stream import TAG_BYTES, decrypt, encrypt, sealed_bytes

COORDINATOR, A = Party("coordinator"), Party("hospital_a")
PLAIN = bytes(range(256)) * 3
KEY = b"k" * 32
SMALL = 64


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Chunks of 64 bytes, so that small messages have many."""
    before, stream.CHUNK_BYTES = stream.CHUNK_BYTES, SMALL
    yield
    stream.CHUNK_BYTES = before


@pytest.fixture(scope="module")
def task(small_chunks: None) -> bytes:
    """A task of 12 chunks, which opens."""
    data = task_envelope(PLAIN, COORDINATOR, A)
    assert open_task(data) == PLAIN
    return data


def open_task(data: bytes) -> bytes:
    """Open as the site that it is for."""
    return open_bytes(
        data,
        kind="task",
        study=STUDY,
        signer=COORDINATOR.signing.public,
        recipient="hospital_a",
        key=A.receiving,
        max_bytes=10**6,
    )[1]


def sealed(plain: bytes) -> bytes:
    """Chunks alone."""
    sink = io.BytesIO()
    encrypt(sink, [plain], len(plain), KEY)
    return sink.getvalue()


def opened(chunks: bytes, size: int) -> bytes:
    """The plaintext of chunks."""
    sink = io.BytesIO()
    decrypt(io.BytesIO(chunks), sink, size, KEY)
    return sink.getvalue()


@given(st.binary(max_size=5 * SMALL))
@settings(max_examples=50)
def test_what_goes_in_comes_out(plain: bytes) -> None:
    assert open_task(task_envelope(plain, COORDINATOR, A)) == plain


@given(st.lists(st.binary(max_size=3 * SMALL), max_size=8))
def test_how_the_plaintext_was_cut_does_not_matter(pieces: list[bytes]) -> None:
    plain = b"".join(pieces)
    sink = io.BytesIO()
    encrypt(sink, pieces, len(plain), KEY)
    assert sink.getvalue() == sealed(plain)
    assert len(sink.getvalue()) == sealed_bytes(len(plain))
    assert opened(sink.getvalue(), len(plain)) == plain


@given(at=st.integers(0), change=st.integers(1, 255))
@settings(max_examples=300)
def test_any_changed_byte_is_found_before_anything_is_written(
    task: bytes, at: int, change: int
) -> None:
    data = bytearray(task)
    data[at % len(task)] ^= change
    sink = io.BytesIO()
    with pytest.raises(TrustError):
        open_envelope(
            io.BytesIO(data),
            sink,
            kind="task",
            study=STUDY,
            signer=COORDINATOR.signing.public,
            recipient="hospital_a",
            key=A.receiving,
            max_bytes=10**6,
        )
    assert sink.getvalue() == b""


def test_every_byte_counts(task: bytes) -> None:
    for at in range(len(task)):
        with pytest.raises(TrustError):
            open_task(task[:at] + bytes([task[at] ^ 1]) + task[at + 1 :])


@given(end=st.integers(0))
@settings(max_examples=100)
def test_any_cut_is_found(task: bytes, end: int) -> None:
    with pytest.raises(TrustError):
        open_task(task[: end % len(task)])


@given(more=st.binary(min_size=1, max_size=100))
def test_anything_after_the_end_is_found(task: bytes, more: bytes) -> None:
    with pytest.raises(TrustError):
        open_task(task + more)


@given(st.permutations(range(5)))
def test_chunks_in_another_order_do_not_open(order: list[int]) -> None:
    size = 5 * SMALL
    plain = bytes(range(256))[:size].ljust(size, b"x")
    chunks = sealed(plain)
    room = SMALL + TAG_BYTES
    moved = b"".join(chunks[n * room : (n + 1) * room] for n in order)
    if order == sorted(order):
        assert opened(moved, size) == plain
    else:
        with pytest.raises(TrustError, match="does not open"):
            opened(moved, size)


@given(st.integers(1, 4))
def test_fewer_chunks_do_not_open_as_a_shorter_message(kept: int) -> None:
    chunks = sealed(bytes(5 * SMALL))
    with pytest.raises(TrustError):
        opened(chunks[: kept * (SMALL + TAG_BYTES)], kept * SMALL)


@given(data=st.binary(max_size=2000))
@settings(max_examples=300)
def test_garbage_is_refused(task: bytes, data: bytes) -> None:
    with pytest.raises(TrustError):
        read_header(io.BytesIO(data), max_bytes=10**6)
    framed = task[:8] + len(data).to_bytes(4, "big") + data + bytes(64)
    with pytest.raises(TrustError):
        open_task(framed)


@given(length=st.integers(0, 2**32 - 1))
def test_a_wrong_length_of_the_header_is_refused(task: bytes, length: int) -> None:
    framed = length.to_bytes(4, "big")
    assume(framed != task[8:12])
    with pytest.raises(TrustError):
        open_task(task[:8] + framed + task[12:])
