"""Faults on purpose: what does a study do when a hospital crashes, hangs or sends nonsense?

`--fault hospital_b:nan@3` makes hospital_b send NaN in round 3; without `@` it does so in every
round. The fault sits between the site's trainer and Flower, where a real one would. Attacks
(`fedseg.simulation.attacks`) are faults too: answers that look right and are not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedseg.container import pack, peek, unpack
from fedseg.errors import PlanError
from fedseg.frozen import Frozen, SiteName
from fedseg.simulation.attacks import ATTACKS, Attack, Handle, Means, poisoned
from fedseg.updates import AnswerHeader, TaskHeader

Broken = Literal["crash", "hang", "nan", "shape", "name", "garbage", "oversized", "replay"]
Kind = Broken | Attack
KINDS: tuple[Kind, ...] = (*get_args(Broken), *ATTACKS)
_ANY_SIZE = 2**62
_HANG_S = 10.0**6


class RehearsedCrashError(RuntimeError):
    """The crash of `--fault SITE:crash`."""


class Fault(Frozen):
    """One hospital's fault, in one round or (None) in all."""

    site: SiteName
    kind: Kind
    round: int | None = None

    def __str__(self) -> str:
        return f"{self.site}:{self.kind}" + (f"@{self.round}" if self.round else "")


def parse_fault(text: str) -> Fault:
    """Read SITE:KIND or SITE:KIND@ROUND.

    Raises:
        PlanError: it reads otherwise, or the kind is unknown.
    """
    found = re.fullmatch(r"([A-Za-z0-9_.-]+):([a-z_]+)(?:@(\d+))?", text)
    if not found or found[2] not in KINDS:
        raise PlanError(
            f"a fault reads SITE:KIND or SITE:KIND@ROUND with a kind of {', '.join(KINDS)}; "
            f"{text!r} came"
        )
    return Fault(site=found[1], kind=found[2], round=int(found[3]) if found[3] else None)


def with_faults(handle: Handle, faults: Sequence[Fault], means: Means | None = None) -> Handle:
    """A trainer's `handle` that fails in training as it is told to.

    Args:
        means: what attacks need besides.
    """
    last: list[bytes] = []

    def faulty(task: bytes) -> bytes:
        header = peek(task, TaskHeader, max_bytes=_ANY_SIZE)
        due = [fault.kind for fault in faults if fault.round in (None, header.round)]
        if header.stage != "train" or not due:
            return handle(task)
        if due[0] == "crash":
            raise RehearsedCrashError("a rehearsed crash")
        if due[0] == "hang":
            time.sleep(_HANG_S)
        if due[0] == "replay" and last:
            return last[0]
        if due[0] in ATTACKS:
            return poisoned(due[0], task, header.round, handle, means or Means())
        answer = handle(task)
        last[:] = [answer]
        return _spoil(answer, due[0])

    return faulty


def _spoil(answer: bytes, kind: Kind) -> bytes:
    """Turn a good answer into a bad one."""
    if kind == "garbage":
        return answer[: len(answer) // 3]
    if kind == "oversized":
        return answer + bytes(3 * len(answer) + 2**22)
    header, delta = unpack(answer, AnswerHeader, max_bytes=_ANY_SIZE, schema=None)
    name = min(delta, default="")
    spoilt: dict[str, NDArray[Any]] = dict(delta)
    if kind == "nan":
        spoilt[name] = np.full_like(spoilt[name], np.nan)
    elif kind == "shape":
        spoilt[name] = np.zeros((*spoilt[name].shape, 2), np.float32)
    elif kind == "name":
        spoilt["not.in.the.plan"] = spoilt.pop(name)
    return pack(header, spoilt)
