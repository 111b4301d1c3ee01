"""A document that is signed: JSON with one encoding and no other.

What was signed is rebuilt from what was read, so both must be the same bytes: a document whose
canonical bytes differ from what came (a key twice, other spaces, "1" for 1, an unknown field) is
refused. White space at the end is forgiven, since editors and mail add it. The size is bounded
before anything is parsed, and what came is never quoted except cut and in printable ASCII.
"""

from __future__ import annotations

import base64
import binascii
import json
from datetime import UTC, datetime, timedelta
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from fedseg.errors import TrustError, printable
from fedseg.frozen import Frozen

Document = TypeVar("Document", bound=Frozen)


def moment(text: str) -> datetime:
    """The time that an ISO 8601 text in UTC names, such as 2026-01-31T12:00:00+00:00.

    Raises:
        ValueError: not such a text.
    """
    found = datetime.fromisoformat(text)
    if found.utcoffset() != timedelta(0):
        raise ValueError("a time in UTC is needed, such as 2026-01-31T12:00:00+00:00")
    return found


def stamp(time: datetime) -> str:
    """A time as documents name it: ISO 8601 in UTC, to the second."""
    return time.astimezone(UTC).isoformat(timespec="seconds")


def _checked_moment(text: str) -> str:
    """The text, once it is seen to name a time."""
    moment(text)
    return text


Moment = Annotated[str, Field(max_length=40), AfterValidator(_checked_moment)]
Signature = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{86}==$")]
UNSIGNED = "A" * 86 + "=="  # stands where the signature will


def open_document(data: bytes, kind: type[Document], *, max_bytes: int, what: str) -> Document:
    """Read a document from an untrusted source; its signature is still to be verified.

    Args:
        data: the bytes as they came.
        kind: the model that it must be.
        max_bytes: anything larger is refused unread.
        what: names the document in messages, such as "the bundle".

    Raises:
        TrustError: too large, not JSON, not this kind of document, or not in canonical form.
    """
    if len(data) > max_bytes:
        raise TrustError(f"{what} has {len(data)} bytes, at most {max_bytes} are allowed")
    try:
        document = kind.model_validate_json(data)
        canonical = document.canonical_bytes
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise TrustError(
            f"{what} is not what was expected: {printable(field)}: {printable(first['msg'])}; "
            "ask for it again"
        ) from None
    except (ValueError, RecursionError):
        raise TrustError(f"{what} is not JSON that can be signed; ask for it again") from None
    if canonical != data.rstrip():
        raise TrustError(f"{what} was changed on its way (its form is not canonical); ask again")
    return document


def signable(document: Frozen) -> bytes:
    """The canonical bytes of a document without its field `signature`."""
    value = document.model_dump(mode="json", exclude={"signature"})
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def to_text(data: bytes) -> str:
    """Bytes as text: base64."""
    return base64.b64encode(data).decode()


def from_text(text: str, size: int | None, what: str) -> bytes:
    """The bytes of a base64 text, which has one spelling only.

    Raises:
        TrustError: not base64, or not `size` bytes.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise TrustError(f"{what} is not base64") from None
    if to_text(data) != text or (size is not None and len(data) != size):
        raise TrustError(f"{what} has {len(data)} bytes or an odd spelling, not {size} bytes")
    return data
