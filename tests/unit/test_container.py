"""The one file format: bounds come before parsing, the schema before the tensors."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_plans import tiny_model

from fedseg.arrays import schema_of
from fedseg.container import MAX_HEADER_BYTES, pack, peek, unpack
from fedseg.durable import write_atomically
from fedseg.errors import RoundError, TrustError
from fedseg.frozen import Frozen
from fedseg.schema import TensorSpec

ROOM = 10**6


class Note(Frozen):
    """A header for tests."""

    text: str = "x"


class Other(Frozen):
    """Another kind of header."""

    number: int


def raw(layout: Any, tensors: bytes = b"", size: int | None = None) -> bytes:
    """A container written by hand, well or badly."""
    head = layout if isinstance(layout, bytes) else json.dumps(layout).encode()
    return struct.pack("<Q", len(head) if size is None else size) + head + tensors


def layout(**entries: Any) -> dict[str, Any]:
    return {"__metadata__": {"fedseg": Note().model_dump_json()}} | entries


def entry(shape: Any = (2,), dtype: Any = "F32", offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def open_any(data: bytes) -> tuple[Note, dict[str, Any]]:
    return unpack(data, Note, max_bytes=ROOM, schema=None)


def test_a_container_comes_back_as_it_went() -> None:
    model = tiny_model()
    data = pack(Note(text="äöü \N{SNOWMAN}"), model)
    header, arrays = unpack(data, Note, max_bytes=len(data), schema=schema_of(model))
    assert header.text == "äöü \N{SNOWMAN}"
    assert arrays.keys() == model.keys()
    for name, array in arrays.items():
        assert array.dtype == model[name].dtype
        assert np.array_equal(array, model[name])
    assert peek(data, Note, max_bytes=len(data)) == header


def test_the_order_of_the_arrays_leaves_the_bytes() -> None:
    model = tiny_model()
    assert pack(Note(), model) == pack(Note(), dict(reversed(model.items())))
    turned = {"w": np.arange(6.0).reshape(2, 3).T}
    assert pack(Note(), turned) == pack(Note(), {"w": turned["w"].copy(order="C")})


def test_a_container_larger_than_allowed_is_not_parsed() -> None:
    data = b"\xff" * 100
    with pytest.raises(TrustError, match="100 bytes came, at most 99"):
        peek(data, Note, max_bytes=99)
    with pytest.raises(TrustError, match="100 bytes came, at most 99"):
        unpack(data, Note, max_bytes=99, schema=())


@pytest.mark.parametrize("size", [2**60, 2**64 - 1, 2**63, MAX_HEADER_BYTES + 1, 1000])
def test_a_header_that_claims_more_than_there_is_is_refused(size: int) -> None:
    with pytest.raises(TrustError, match="oversized"):
        open_any(raw(layout(), size=size))


def test_a_header_beyond_its_bound_is_refused_though_it_is_there() -> None:
    data = raw(layout(), b"")
    with pytest.raises(TrustError, match="oversized"):
        unpack(data, Note, max_bytes=ROOM, schema=None, max_header_bytes=10)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"[" * 200_000, "no JSON"),
        (b'{"a":' * 100_000, "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"", "no JSON"),
        (b'{"__metadata__": NaN}', "no JSON"),
        (b'{"a": Infinity}', "no JSON"),
        (b"1" * 5000, "no JSON"),
        (b"[]", "no mapping"),
        (b"null", "no mapping"),
        (b"{}", "none of fedseg's"),
        (b'{"__metadata__": []}', "none of fedseg's"),
        (b'{"__metadata__": {"fedseg": 3}}', "none of fedseg's"),
        (b'{"__metadata__": {"other": "{}"}}', "none of fedseg's"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_header_that_is_none_is_refused(head: bytes, message: str) -> None:
    started = time.process_time()
    with pytest.raises(TrustError, match=message):
        open_any(raw(head))
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"text": 3}',
        '{"text": "a", "more": 1}',
        '{"text": NaN}',
        "[" * 5000,
        "\ud800",
        '{"\ud800": 1}',
        json.dumps({"x" * 10_000: 1}),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_a_wrong_header_is_refused_in_few_printable_words(text: str) -> None:
    with pytest.raises(TrustError, match="the header is no Note") as caught:
        open_any(raw({"__metadata__": {"fedseg": text}}))
    assert len(str(caught.value)) < 250
    assert str(caught.value).isascii()


def test_another_kind_of_container_is_refused() -> None:
    with pytest.raises(TrustError, match="the header is no Other"):
        peek(pack(Note()), Other, max_bytes=ROOM)


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry(offsets=(0, 4))},
        {"a": entry(offsets=(8, 0))},
        {"a": entry(offsets=(-8, 0))},
        {"a": entry(offsets=(0, 16))},
        {"a": entry(offsets=(4, 12))},
        {"a": entry(offsets=(0,))},
        {"a": entry(offsets=None)},
        {"a": entry(shape=(3,))},
        {"a": entry(shape=(-2,))},
        {"a": entry(shape=(2**62, 2**62))},
        {"a": entry(shape="2")},
        {"a": entry(shape=(2.0,))},
        {"a": entry(shape=(True, 2))},
        {"a": entry(dtype="F31")},
        {"a": entry(dtype=None)},
        {"a": entry(dtype="BF16", shape=(4,))},
        {"a": entry(dtype="F8_E4M3", shape=(8,))},
        {"a": 3},
        {"a": []},
        {"a": entry(), "b": entry()},
        {"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(1,), offsets=(2, 6))},
        {},
    ],
    ids=repr,
)
def test_offsets_shapes_and_types_that_do_not_add_up_are_refused(entries: dict[str, Any]) -> None:
    with pytest.raises(TrustError, match="damaged"):
        open_any(raw(layout(**entries), bytes(8)))


def test_one_key_twice_cannot_show_the_check_another_tensor_than_the_reader() -> None:
    good, evil = json.dumps(entry()), json.dumps(entry(shape=(2, 1)))
    note = json.dumps(layout()["__metadata__"])
    for first, second in ((good, evil), (evil, good)):
        data = raw(f'{{"__metadata__": {note}, "a": {first}, "a": {second}}}'.encode(), bytes(8))
        schema = (TensorSpec(name="a", shape=(2,), dtype="float32"),)
        try:
            _, arrays = unpack(data, Note, max_bytes=ROOM, schema=schema)
        except TrustError:
            continue
        assert arrays["a"].shape == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conv.bias": None},
            r"3 tensors, the message 2; 1 names differ, the first is 'conv.bias'",
        ),
        ({"extra": np.zeros(1, np.float32)}, "3 tensors, the message 4"),
        (
            {"conv.bias": np.zeros(3, np.float32)},
            r"'conv.bias' should be float32 \[2\].*\[3\] came",
        ),
        ({"conv.bias": np.zeros((2, 1), np.float32)}, r"float32 \[2, 1\] came"),
        ({"conv.bias": np.zeros(2, np.float64)}, r"but float64 \[2\] came"),
        ({"gain": np.zeros(1, np.float32)}, r"'gain' should be float32 \[\], but float32 \[1\]"),
    ],
)
def test_other_tensors_than_the_schemas_are_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny_model()
    came = {name: a for name, a in (model | changes).items() if a is not None}
    with pytest.raises(TrustError, match=message):
        unpack(pack(Note(), came), Note, max_bytes=ROOM, schema=schema_of(model))


def test_a_type_that_no_plan_has_is_refused() -> None:
    schema = (TensorSpec(name="a", shape=(8,), dtype="uint8"),)
    data = raw(layout(a=entry(shape=(8,), dtype="BOOL")), bytes(8))
    with pytest.raises(TrustError, match=r"should be uint8 \[8\], but None"):
        unpack(data, Note, max_bytes=ROOM, schema=schema)


@pytest.mark.parametrize("shape", ["\ud800", ["\ud800"], "\n\x1b[2J", "x" * 10_000, [1] * 10_000])
def test_a_refusal_repeats_little_of_the_sender_and_in_ascii(shape: Any) -> None:
    schema = (TensorSpec(name="a", shape=(2,), dtype="float32"),)
    with pytest.raises(TrustError, match="should be float32") as caught:
        unpack(raw(layout(a=entry(shape=shape)), bytes(8)), Note, max_bytes=ROOM, schema=schema)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()
    assert str(caught.value).isascii()
    odd = {"\ud800\n" * 500: entry()}
    with pytest.raises(TrustError, match="names differ") as caught:
        unpack(raw(layout(**odd), bytes(8)), Note, max_bytes=ROOM, schema=())
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


def test_a_file_is_replaced_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, b"one", mode=0o600)
    write_atomically(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full to play a full disk")
    path = tmp_path / "file"
    write_atomically(path, b"old")
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(RoundError, match=r"cannot write file: No space left.*make room"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from fedseg.durable import write_atomically
from fedseg.errors import RoundError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path(sys.argv[1]), bytes(5000))
except RoundError as error:
    print(error)
"""


def test_a_file_that_is_cut_short_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "cannot write file: File too large" in done.stdout
    assert str(tmp_path) not in done.stdout
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_a_round_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        with pytest.raises(RoundError, match="cannot write below"):
            write_atomically(path, b"new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RoundError, match="cannot write folder"):
        write_atomically(tmp_path / "folder", b"new")
