"""What relay, other sites and a coordinator can try with envelopes."""

from __future__ import annotations

import hashlib
import io
import json
import secrets
from typing import Any

import pytest
from small_parties import PLAN, ROLL, STUDY, Party, answer_envelope, task_envelope

from fedseg.errors import TrustError
from fedseg.security.documents import to_text
from fedseg.security.envelope import (
    MAGIC,
    MAX_HEADER_BYTES,
    EnvelopeHeader,
    open_bytes,
    open_envelope,
    read_header,
)
from fedseg.security.envelope import _info as info
from fedseg.security.keys import ReceivingKey
from fedseg.security.stream import encrypt

COORDINATOR, OTHER_STUDY = Party("coordinator"), Party("coordinator")
A, B = Party("hospital_a"), Party("hospital_b")
PLAIN = b"weights" * 100


def open_task(data: bytes, **changes: Any) -> bytes:
    """Open as hospital_a."""
    fields = {
        "kind": "task",
        "study": STUDY,
        "signer": COORDINATOR.signing.public,
        "recipient": "hospital_a",
        "key": A.receiving,
        "max_bytes": 10**6,
    }
    return open_bytes(data, **{**fields, **changes})[1]


def open_answer(data: bytes, **changes: Any) -> bytes:
    """Open as the coordinator, from hospital_a."""
    fields = {
        "kind": "answer",
        "study": STUDY,
        "signer": A.signing.public,
        "recipient": "coordinator",
        "key": COORDINATOR.receiving,
        "max_bytes": 10**6,
    }
    return open_bytes(data, **{**fields, **changes})[1]


def parts(data: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    """Header, signature and chunks."""
    end = 12 + int.from_bytes(data[8:12], "big")
    return json.loads(data[12:end]), data[end : end + 64], data[end + 64 :]


def framed(magic: bytes, header: dict[str, Any], signature: bytes, chunks: bytes) -> bytes:
    """An envelope of given parts."""
    raw = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return magic + len(raw).to_bytes(4, "big") + raw + signature + chunks


def resigned(data: bytes, signer: Party, **changes: Any) -> bytes:
    """The same ciphertext under another header, properly signed by somebody."""
    header, _, chunks = parts(data)
    header = {**header, **changes}
    raw = EnvelopeHeader.model_validate(header).canonical_bytes
    return framed(data[:8], header, signer.signing.sign("envelope", raw), chunks)


def test_a_task_by_another_key_is_refused() -> None:
    forged = task_envelope(PLAIN, OTHER_STUDY, A)
    with pytest.raises(TrustError, match="signature of the envelope"):
        open_task(forged)
    with pytest.raises(TrustError, match="signature of the envelope"):
        open_task(task_envelope(PLAIN, B, A, sender="coordinator"))


def test_a_task_of_another_study_is_refused() -> None:
    data = task_envelope(PLAIN, COORDINATOR, A, study="elsewhere")
    with pytest.raises(TrustError, match="the task of 'tiny', a task of 'elsewhere'"):
        open_task(data)


def test_an_answer_is_no_task() -> None:
    reflected = answer_envelope(
        PLAIN, A, COORDINATOR, recipients={"hospital_a": A.receiving.public}
    )
    with pytest.raises(TrustError, match="expected the task"):
        open_task(reflected, signer=A.signing.public)
    with pytest.raises(TrustError, match="expected the answer"):
        open_answer(task_envelope(PLAIN, COORDINATOR, A), signer=COORDINATOR.signing.public)


def test_who_is_no_recipient_reads_nothing() -> None:
    data = task_envelope(PLAIN, COORDINATOR, B)
    with pytest.raises(TrustError, match="not sealed for 'hospital_a'"):
        open_task(data)
    with pytest.raises(TrustError, match="does not open"):
        open_task(data, recipient="hospital_b")


def test_the_wrapped_key_of_another_name_does_not_open() -> None:
    """Even for the holder of the key: the name is bound to it."""
    both = {"hospital_a": A.receiving.public, "alias": A.receiving.public}
    data = task_envelope(PLAIN, COORDINATOR, recipients=both)
    keys = parts(data)[0]["keys"]
    swapped = {"hospital_a": keys["alias"], "alias": keys["hospital_a"]}
    with pytest.raises(TrustError, match="does not open"):
        open_task(resigned(data, COORDINATOR, keys=swapped))


@pytest.mark.parametrize(
    "changes",
    [
        {"sender": "hospital_b"},
        {"about": "d" * 64},
        {"plan": "d" * 64},
        {"roll": "d" * 64},
    ],
)
def test_a_site_cannot_pass_off_the_answer_of_another(changes: dict[str, Any]) -> None:
    """hospital_b copies ciphertext and wrapped key, says something else and signs it properly."""
    stolen = resigned(answer_envelope(PLAIN, A, COORDINATOR), B, **changes)
    with pytest.raises(TrustError, match="does not open"):
        open_answer(stolen, signer=B.signing.public)


def test_a_task_is_the_one_that_its_header_names() -> None:
    """A coordinator signs one digest and seals another task, so that records would disagree."""
    key, chunks = secrets.token_bytes(32), io.BytesIO()
    _, digest = encrypt(chunks, [b"another task"], 12, key)
    fields: dict[str, Any] = {"kind": "task", "study": STUDY, "plan": PLAN, "roll": ROLL}
    fields |= {"about": hashlib.sha256(b"said").hexdigest(), "sender": "coordinator", "size": 12}
    blank = EnvelopeHeader(**fields, keys={}, ciphertext="0" * 64)
    wrapped = A.receiving.public.wrap(key, info(blank, "hospital_a"))
    header = EnvelopeHeader(**fields, keys={"hospital_a": to_text(wrapped)}, ciphertext=digest)
    signature = COORDINATOR.signing.sign("envelope", header.canonical_bytes)
    data = framed(MAGIC, json.loads(header.canonical_bytes), signature, chunks.getvalue())
    with pytest.raises(TrustError, match="not the one that its envelope names"):
        open_task(data)


def test_a_destroyed_receiving_key_opens_nothing() -> None:
    data = answer_envelope(PLAIN, A, COORDINATOR)
    assert open_answer(data) == PLAIN
    with pytest.raises(TrustError, match="does not open"):
        open_answer(data, key=ReceivingKey.generate())


def test_sizes_are_bounded_before_anything_is_read() -> None:
    data = task_envelope(PLAIN, COORDINATOR, A)
    with pytest.raises(TrustError, match="at most 699"):
        open_task(data, max_bytes=len(PLAIN) - 1)
    with pytest.raises(TrustError, match="at most 699"):
        read_header(io.BytesIO(data), max_bytes=len(PLAIN) - 1)
    huge = data[:8] + (MAX_HEADER_BYTES + 1).to_bytes(4, "big") + data[12:]
    with pytest.raises(TrustError, match="not an envelope"):
        read_header(io.BytesIO(huge), max_bytes=10**6)
    claimed = resigned(data, COORDINATOR, size=10**6)
    with pytest.raises(TrustError, match="cut"):
        open_task(claimed)


def test_a_header_reads_no_further_than_it_says() -> None:
    class Counting(io.BytesIO):
        """Counts what is asked for."""

        asked = 0

        def read(self, size: int | None = -1) -> bytes:
            assert size is not None
            self.asked += size
            return super().read(size)

    source = Counting(task_envelope(bytes(10**6), COORDINATOR, A))
    read_header(source, max_bytes=10**6)
    assert source.asked < 10_000


def test_a_file_that_changes_while_it_is_opened_is_refused() -> None:
    """After the digest was verified: the chunks themselves are authentic too."""

    class Changing(io.BytesIO):
        """Another byte on the second reading."""

        def seek(self, at: int, whence: int = 0) -> int:
            self.getbuffer()[-1] ^= 1
            return super().seek(at, whence)

    with pytest.raises(TrustError, match="what was written is void"):
        open_envelope(
            Changing(task_envelope(PLAIN, COORDINATOR, A)),
            io.BytesIO(),
            kind="task",
            study=STUDY,
            signer=COORDINATOR.signing.public,
            recipient="hospital_a",
            key=A.receiving,
            max_bytes=10**6,
        )


def test_a_message_of_refusal_holds_no_plaintext_and_no_key() -> None:
    data = bytearray(task_envelope(PLAIN, COORDINATOR, A))
    data[-1] ^= 1
    with pytest.raises(TrustError) as caught:
        open_task(bytes(data))
    assert "weights" not in str(caught.value)
    assert COORDINATOR.receiving.public.text[:16] not in str(caught.value)
