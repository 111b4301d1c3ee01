"""How fedseg's bytes ride in Flower's messages: one opaque array a message, one action.

Flower cuts arrays into content-addressed chunks and sends equal content once, so a task that is the
same for every site is stored once. Both halves of the federation use this and nothing else of
Flower's message content.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedseg.errors import TrustError

ACTION = "fedseg"
MESSAGE_TYPE = f"query.{ACTION}"
BUSY = "busy"  # a relay's reason for no answer: the trainer works on this very task
_RECORD = "fedseg"
_STYPE = "fedseg.bytes"


def wrap(data: bytes) -> RecordDict:
    """Put opaque bytes into the content of a message."""
    array = Array(dtype="uint8", shape=(len(data),), stype=_STYPE, data=data)
    return RecordDict({_RECORD: ArrayRecord({_RECORD: array})})


def unwrap(message: Message) -> bytes:
    """Take the bytes out of a message.

    Raises:
        TrustError: the message has other content than one opaque array.
    """
    record = message.content.get(_RECORD)
    if len(message.content) == 1 and isinstance(record, ArrayRecord) and len(record) == 1:
        array = record.get(_RECORD)
        if array is not None and array.stype == _STYPE:
            return array.data
    raise TrustError("a Flower message without fedseg's content came")
