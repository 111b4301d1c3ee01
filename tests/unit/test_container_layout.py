"""What containers hold is laid out as safetensors does it, and read without a copy."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load, save

from fedseg.container import pack, packed, unpack
from fedseg.durable import write_atomically
from fedseg.errors import TrustError
from fedseg.frozen import Frozen


class _Note(Frozen):
    text: str


NOTE = _Note(text='{"a": "é\\ \u2028\n\x01\x7f/<"}')
ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([1, 2], np.int64),
    "big": np.arange(4, dtype=">f8").reshape(2, 2).T,
    "empty": np.zeros((0, 2)),
    "half": np.ones(3, np.float16),
    "é": np.array(7, np.uint8),
}


def _read(data: bytes) -> dict[str, np.ndarray]:
    return unpack(data, _Note, max_bytes=10**6, schema=None)[1]


def _with_table(table: dict, body: bytes) -> bytes:
    table = {"__metadata__": {"fedseg": NOTE.model_dump_json()}, **table}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize("names", [(), ("b",), tuple(ARRAYS)])
def test_bytes_are_those_of_the_safetensors_library(names):
    arrays = {name: ARRAYS[name] for name in names}
    dense = {
        name: np.asarray(a, a.dtype.newbyteorder("<"), order="C") for name, a in arrays.items()
    }
    expected = save(dense, metadata={"fedseg": NOTE.model_dump_json()})
    assert pack(NOTE, arrays) == expected
    assert pack(NOTE, dict(reversed(arrays.items()))) == expected


def test_what_is_read_is_what_the_library_reads():
    data = pack(NOTE, ARRAYS)
    own, theirs = _read(data), load(data)
    assert own.keys() == theirs.keys()
    for name, array in own.items():
        assert array.dtype == theirs[name].dtype
        assert array.shape == theirs[name].shape
        assert array.tobytes() == theirs[name].tobytes()


def test_arrays_are_read_only_views_of_the_message():
    data = pack(NOTE, ARRAYS)
    array = _read(data)["b"]
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_a_file_is_written_piece_by_piece(tmp_path):
    write_atomically(tmp_path / "file", packed(NOTE, ARRAYS))
    assert (tmp_path / "file").read_bytes() == pack(NOTE, ARRAYS)


def test_types_that_containers_do_not_carry_are_refused():
    with pytest.raises(ValueError, match="float32"):
        pack(NOTE, {"a": np.array([True])})


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "table",
    [
        {"a": _entry(offsets=(0, 4))},
        {"a": _entry(offsets=(4, 12))},
        {"a": _entry(offsets=(0, 16))},
        {"a": _entry(offsets=(8, 0))},
        {"a": _entry(offsets=(-8, 0))},
        {"a": _entry(offsets=(0, 8, 8))},
        {"a": _entry(shape=(-1, -2))},
        {"a": _entry(shape=(2.0,))},
        {"a": _entry(shape=(True, 2))},
        {"a": _entry(shape=(2**62, 2**62))},
        {"a": _entry(shape=(1,) * 100)},
        {"a": _entry(dtype="BOOL")},
        {"a": _entry(dtype=["F32"])},
        {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": [0, 8]},
        {"a": _entry(), "b": _entry()},
        {"a": _entry(), "b": _entry(offsets=(4, 12))},
        {"a": _entry("U8", (1,), (0, 1)), "b": _entry("F32", (1,), (1, 5))},
        {},
    ],
)
def test_a_table_that_does_not_fit_its_bytes_is_refused(table):
    with pytest.raises(TrustError, match="damaged"):
        _read(_with_table(table, bytes(8)))


def test_an_unpadded_header_is_refused():
    text = json.dumps({"__metadata__": {"fedseg": NOTE.model_dump_json()}, "a": _entry()}).encode()
    text += b" " * (-len(text) % 8 + 1)
    with pytest.raises(TrustError, match="damaged"):
        _read(struct.pack("<Q", len(text)) + text + bytes(8))
