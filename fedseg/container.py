"""One file format for all that carries tensors: safetensors with a JSON header checked by pydantic.

Tasks, answers, models and checkpoints are containers. The header stands under one metadata key, so
equal contents give equal bytes. Reading is bounded: the size is checked first, then names, shapes
and dtypes against a schema, and only then are tensors looked at. No pickle, no code. Models are
large, so nothing is copied that need not be: what is read are views of the bytes as they came, and
a file is written from the arrays themselves.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from fedseg.arrays import Arrays
from fedseg.durable import Buffer
from fedseg.errors import TrustError, printable
from fedseg.schema import TensorSpec

Header = TypeVar("Header", bound=BaseModel)
MAX_HEADER_BYTES = 16 * 1024 * 1024
_KEY = "fedseg"
_ALIGNMENT = 8
# In the order in which safetensors lays tensors out.
_DTYPES = {"I64": "int64", "F64": "float64", "F32": "float32", "F16": "float16", "U8": "uint8"}
# By kind and width, such as "f4": a numpy dtype's name takes twenty times as long to ask for.
_PLACES = {np.dtype(dtype).str[1:]: place for place, dtype in enumerate(_DTYPES.values())}
_CODES = dict(zip(_PLACES, _DTYPES, strict=True))


def pack(header: BaseModel, arrays: Arrays | None = None, head_bytes: int = 0) -> bytes:
    """Write a header and named arrays; equal inputs give equal bytes.

    Args:
        head_bytes: the least size of what stands before the tensors; it is filled up with spaces.

    Raises:
        ValueError: an array is of a type that containers do not carry.
    """
    return b"".join(packed(header, arrays, head_bytes))


def packed(header: BaseModel, arrays: Arrays | None = None, head_bytes: int = 0) -> list[Buffer]:
    """The pieces whose sum is `pack`: the head, then views of the arrays, which must not change.

    Byte for byte what the safetensors library writes, unless the head is filled up.

    Raises:
        ValueError: an array is of a type that containers do not carry.
    """
    dense = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    kinds = {name: array.dtype.str[1:] for name, array in dense.items()}
    if not all(kind in _CODES for kind in kinds.values()):
        raise ValueError(
            f"containers carry {', '.join(_DTYPES.values())} alone: convert the arrays"
        )
    table: dict[str, Any] = {"__metadata__": {_KEY: header.model_dump_json()}}
    pieces: list[Buffer] = []
    end = 0
    for name in sorted(dense, key=lambda name: (_PLACES[kinds[name]], name)):
        array, start = dense[name], end
        end += array.nbytes
        code, shape = _CODES[kinds[name]], list(array.shape)
        table[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        pieces.append(little.reshape(-1).view(np.uint8).data)
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(head_bytes - 8)
    text += b" " * (-len(text) % _ALIGNMENT)
    return [struct.pack("<Q", len(text)), text, *pieces]


def peek(data: Buffer, header_type: type[Header], *, max_bytes: int) -> Header:
    """Read the header of a container alone; the tensors stay unread.

    Raises:
        TrustError: too large, malformed, or another kind of container.
    """
    return _open_header(data, header_type, max_bytes)[0]


def unpack(
    data: Buffer,
    header_type: type[Header],
    *,
    max_bytes: int,
    schema: Sequence[TensorSpec] | None,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> tuple[Header, dict[str, NDArray[Any]]]:
    """Open a container from an untrusted source.

    Args:
        data: the bytes as they came; a file may be mapped into memory.
        header_type: the pydantic model that the header must be.
        max_bytes: anything larger is refused unread.
        schema: the tensors that must be there, no more and no fewer; None takes any.
        max_header_bytes: a larger header is refused unparsed; safetensors itself reads 100 MB.

    Returns:
        The header and the arrays by name: read-only views of `data`.

    Raises:
        TrustError: too large, malformed, another kind of container, or not the schema's tensors.
    """
    header, layout = _open_header(data, header_type, max_bytes, max_header_bytes)
    if schema is not None:
        _check_schema(layout, schema)
    return header, _views(data, layout)


def _open_header(
    data: Buffer,
    header_type: type[Header],
    max_bytes: int,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> tuple[Header, dict[str, Any]]:
    """The checked header, and the table of the tensors."""
    if len(data) > max_bytes:
        raise TrustError(f"a message of {len(data)} bytes came, at most {max_bytes} are allowed")
    layout = _layout(data, max_header_bytes)
    metadata = layout.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_KEY), str):
        raise TrustError("the message is a safetensors file, but none of fedseg's")
    try:
        return header_type.model_validate_json(metadata[_KEY]), layout
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise TrustError(
            f"the header is no {header_type.__name__}: {printable(field)}: "
            f"{printable(first['msg'])}"
        ) from None


def _layout(data: Buffer, max_header_bytes: int) -> dict[str, Any]:
    """The safetensors table of contents, bounded before it is parsed."""
    if len(data) < 8:
        raise TrustError("the message is too short to be one of fedseg's")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(max_header_bytes, len(data) - 8):
        raise TrustError("the message is not a safetensors file, or its header is oversized")
    try:
        layout = json.loads(bytes(data[8 : 8 + size]), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise TrustError("the message is not a safetensors file: its header is no JSON") from None
    if not isinstance(layout, dict):
        raise TrustError("the message is not a safetensors file: its header is no mapping")
    return layout


def _views(data: Buffer, layout: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Every tensor, once the table is seen to cover the bytes without a gap or an overlap."""
    view = memoryview(data).toreadonly()
    (size,) = struct.unpack("<Q", view[:8])
    start = end = 8 + size
    arrays: dict[str, NDArray[Any]] = {}
    try:
        table = {name: _entry(entry) for name, entry in layout.items()}
        for name in sorted(table, key=lambda name: table[name][2]):
            dtype, shape, (low, high) = table[name]
            count = prod(shape)
            fits = start + low == end and high - low == count * dtype.itemsize
            if not fits or end % dtype.itemsize:
                raise ValueError("offsets")
            arrays[name] = np.frombuffer(view, dtype, count, end).reshape(shape)
            end = start + high
        if end != len(data):
            raise ValueError("length")
    except (KeyError, TypeError, ValueError, OverflowError):
        raise TrustError(
            "the tensors of the message are damaged: its table does not fit its length"
        ) from None
    return arrays


def _entry(entry: Any) -> tuple[np.dtype[Any], list[int], tuple[int, int]]:
    """Dtype, shape and offsets of one tensor of the table; raises where they are absurd."""
    dtype = np.dtype(_DTYPES[entry["dtype"]]).newbyteorder("<")
    numbers = [*entry["shape"], *entry["data_offsets"]]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("numbers")
    *shape, low, high = numbers
    if len(entry["data_offsets"]) != 2:
        raise ValueError("offsets")
    return dtype, shape, (low, high)


def _check_schema(layout: dict[str, Any], schema: Sequence[TensorSpec]) -> None:
    """Refuse other names, shapes or dtypes than the plan's."""
    expected = {spec.name: spec for spec in schema}
    if layout.keys() != expected.keys():
        odd = sorted(layout.keys() ^ expected.keys())
        raise TrustError(
            f"the plan's model has {len(expected)} tensors, the message {len(layout)}; "
            f"{len(odd)} names differ, the first is '{printable(odd[0])}'"
        )
    for name, spec in expected.items():
        entry = layout[name] if isinstance(layout[name], dict) else {}
        shape, dtype = entry.get("shape"), _DTYPES.get(str(entry.get("dtype")))
        if shape != list(spec.shape) or dtype != spec.dtype:
            raise TrustError(
                f"tensor {name!r} should be {spec.dtype} {list(spec.shape)}, "
                f"but {dtype} {printable(shape)} came"
            )


def _refuse_constant(name: str) -> None:
    """NaN and Infinity, which Python reads although JSON has neither."""
    raise ValueError(f"{name} is not JSON")
