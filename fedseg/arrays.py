"""Named numpy arrays: their digest and schema, and the seeds that everything random starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedseg.schema import TensorSpec

Arrays = Mapping[str, NDArray[np.generic]]


def schema_of(arrays: Arrays) -> tuple[TensorSpec, ...]:
    """Name, shape and dtype of every array, sorted by name."""
    return tuple(
        TensorSpec.model_validate({"name": name, "shape": a.shape, "dtype": a.dtype.name})
        for name, a in sorted(arrays.items())
    )


def digest_of(arrays: Arrays) -> str:
    """SHA-256 over the schema and the bytes of every array (C order, little-endian), by name."""
    hasher = hashlib.sha256()
    for spec in schema_of(arrays):
        array = np.asarray(arrays[spec.name], order="C")
        hasher.update(spec.model_dump_json().encode() + b"\n")
        hasher.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return hasher.hexdigest()


def seed_for(seed: int, site: str, round_: int, purpose: str) -> int:
    """A seed in [0, 2**63) for one purpose, from names alone: never from an order or a worker."""
    text = "\x1f".join(("fedseg", str(seed), site, str(round_), purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
