"""Whatever bytes come, a container opens to what its schema says or is refused."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedseg.arrays import schema_of
from fedseg.container import pack, peek, unpack
from fedseg.errors import TrustError
from fedseg.frozen import Frozen

ROOM = 10**6
DTYPES = ("float32", "float64", "float16", "int64", "uint8")


class Note(Frozen):
    """A header for tests."""

    text: str
    number: int = 0


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
arrays = st.dictionaries(
    names,
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(
            dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
        )
    ),
    max_size=4,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(arrays, texts)
def test_what_goes_in_comes_out(model: dict[str, Any], text: str) -> None:
    data = pack(Note(text=text), model)
    header, found = unpack(data, Note, max_bytes=len(data), schema=schema_of(model))
    assert header == Note(text=text)
    assert found.keys() == model.keys()
    for name, array in model.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert found[name].tobytes() == array.tobytes()
    assert pack(header, found) == data


@given(arrays, st.randoms(use_true_random=False))
def test_equal_inputs_give_equal_bytes(model: dict[str, Any], random: Any) -> None:
    shuffled = list(model.items())
    random.shuffle(shuffled)
    turned = {name: np.asfortranarray(a) if a.ndim else a for name, a in shuffled}
    assert pack(Note(text="x"), turned) == pack(Note(text="x"), model)


MODEL = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(7, np.int64)}
SCHEMA = schema_of(MODEL)
DATA = pack(Note(text="hello", number=3), MODEL)
BODY = 8 + struct.unpack("<Q", DATA[:8])[0]


def opens_or_is_refused(data: bytes) -> tuple[Note, dict[str, Any]] | None:
    """The content, in the schema's shapes; nothing else than TrustError escapes."""
    try:
        header, found = unpack(data, Note, max_bytes=ROOM, schema=SCHEMA)
    except TrustError as error:
        assert str(error).isascii()
        return None
    assert schema_of(found) == SCHEMA
    assert peek(data, Note, max_bytes=ROOM) == header
    return header, found


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_stays_where_it_was(place: int, change: int) -> None:
    data = bytearray(DATA)
    data[place] ^= change
    opened = opens_or_is_refused(bytes(data))
    if place >= BODY:
        assert opened is not None
        assert opened[0] == Note(text="hello", number=3)
    elif opened is not None and opened[0] == Note(text="hello", number=3):
        blobs = sorted(array.tobytes() for array in opened[1].values())
        assert blobs == sorted(array.tobytes() for array in MODEL.values())


@given(st.integers(0, len(DATA) - 1))
def test_a_message_cut_short_is_refused(length: int) -> None:
    assert opens_or_is_refused(DATA[:length]) is None


@given(st.binary(min_size=1, max_size=40))
def test_a_longer_message_is_refused(tail: bytes) -> None:
    assert opens_or_is_refused(DATA + tail) is None


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    assert opens_or_is_refused(data) is None


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_arbitrary_headers_are_refused(head: bytes, tail: bytes) -> None:
    assert opens_or_is_refused(struct.pack("<Q", len(head)) + head + tail) is None


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
words = st.sampled_from(["dtype", "shape", "data_offsets", "F32", "I64", "fedseg"])
json_values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=3), inner),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I64", "F64", "BF16", "BOOL"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-8, 40), min_size=2, max_size=2) | json_values,
    }
)
note = {"fedseg": Note(text="x").model_dump_json()}
layouts = st.fixed_dictionaries(
    {"a": entries | json_values, "b": entries | json_values},
    optional={"c": entries, "__metadata__": st.just(note) | json_values},
)


@given(layouts, st.booleans())
def test_a_header_of_the_right_words_in_the_wrong_places_is_refused_or_fits(
    layout: dict[str, Any], keep_note: bool
) -> None:
    value = layout | ({"__metadata__": note} if keep_note else {})
    head = json.dumps(value).encode()
    data = struct.pack("<Q", len(head)) + head + DATA[BODY:]
    opens_or_is_refused(data)
    try:
        unpack(data, Note, max_bytes=ROOM, schema=None)
    except TrustError as error:
        assert str(error).isascii()
