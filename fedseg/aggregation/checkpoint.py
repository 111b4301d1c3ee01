"""A study's state on disk: one container, replaced atomically after every stage."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from fedseg.aggregation.rounds import Position, StudyState
from fedseg.aggregation.server import Model, ServerState
from fedseg.arrays import digest_of
from fedseg.container import packed, unpack
from fedseg.durable import write_atomically
from fedseg.errors import RoundError, TrustError
from fedseg.frozen import Digest, Frozen
from fedseg.plan import StudyPlan
from fedseg.result import StageRecord

_HISTORY_BYTES = 96_000_000
_REMEMBERED = ("momentum", "average", "second", "control")


class _CheckpointHeader(Frozen):
    """All of a state but its tensors, of which it has the digest: a disk may lie."""

    format: Literal["fedseg-checkpoint/1"] = "fedseg-checkpoint/1"
    plan: str
    position: Position | None
    steps: int
    tensors: Digest
    history: tuple[StageRecord, ...]


def save_state(path: Path, plan: StudyPlan, state: StudyState) -> None:
    """Store a state; after a crash the file holds the old or the new state, never a part.

    Raises:
        RoundError: the disk is full; the old state is untouched.
    """
    server = state.server
    parts = {"model": server.model} | {part: getattr(server, part) for part in _REMEMBERED}
    arrays = {f"{part}/{k}": v for part, some in parts.items() for k, v in (some or {}).items()}
    header = _CheckpointHeader(
        plan=plan.digest,
        position=state.position,
        steps=server.steps,
        tensors=digest_of(arrays),
        history=state.history,
    )
    write_atomically(path, packed(header, arrays))


def load_state(path: Path, plan: StudyPlan) -> StudyState:
    """Read a stored state.

    Raises:
        RoundError: there is none, or it is of another plan.
        TrustError: the file is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RoundError(f"no checkpoint to go on from in {path.name}: {error.strerror}") from None
    header, arrays = unpack(
        data,
        _CheckpointHeader,
        max_bytes=_limit(plan),
        schema=None,
        max_header_bytes=_HISTORY_BYTES,
    )
    if header.plan != plan.digest:
        raise RoundError(
            "the checkpoint is of another plan: give the plan it was made with, or another --out"
        )
    model = _part(arrays, "model")
    if model is None or digest_of(arrays) != header.tensors:
        raise TrustError("the checkpoint is damaged: its tensors are not the ones that were stored")
    remembered = {part: _part(arrays, part) for part in _REMEMBERED}
    server = ServerState(model, steps=header.steps, **remembered)
    return StudyState(header.position, server, header.history)


def _limit(plan: StudyPlan) -> int:
    """The largest checkpoint: the model, and all that a server remembers of it as float64."""
    width = 8 * len(_REMEMBERED)
    sizes = (spec.nbytes + width * prod(spec.shape) for spec in plan.built.tensors)
    return _HISTORY_BYTES + 1024 + sum(sizes)


def _part(arrays: dict[str, NDArray[Any]], part: str) -> Model | None:
    """The arrays under one prefix, or None where there are none."""
    prefix = part + "/"
    found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return found or None
