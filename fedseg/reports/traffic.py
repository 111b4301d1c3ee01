"""What moved between the hospitals and the coordinator, and which hospital failed when.

A message down carries one task to one site; a message up is one answer. A site that failed was
sent its task and counts as one message down and none up. Bytes are those of the stage records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fedseg.result import StageRecord, StudyResult, weighted_mean

MOST_LINES = 40


@dataclass(frozen=True)
class Traffic:
    """Messages and bytes of some stages."""

    name: str
    stages: int
    messages_down: int
    messages_up: int
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True)
class RoundLine:
    """One round, or several neighbouring ones where there are many; scores are of the last."""

    rounds: str
    traffic: Traffic
    loss: float | None
    dice: float | None
    failures: int


@dataclass(frozen=True)
class FailureLine:
    """One kind of failure of one site, and the rounds in which it happened."""

    site: str
    rounds: str
    stage: str
    code: str
    reason: str


def traffic(stages: Sequence[StageRecord], name: str) -> Traffic:
    """The sum over stages."""
    answers = sum(len(record.answers) for record in stages)
    return Traffic(
        name=name,
        stages=len(stages),
        messages_down=answers + sum(len(record.failures) for record in stages),
        messages_up=answers,
        bytes_down=sum(record.bytes_down for record in stages),
        bytes_up=sum(record.bytes_up for record in stages),
    )


def by_stage(result: StudyResult) -> tuple[Traffic, ...]:
    """One line a kind of stage, in the order in which they first came, then the total."""
    kinds = dict.fromkeys(record.stage for record in result.stages)
    lines = [traffic([r for r in result.stages if r.stage == kind], kind) for kind in kinds]
    return (*lines, traffic(result.stages, "total"))


def by_round(result: StudyResult) -> tuple[RoundLine, ...]:
    """One line a round; neighbours share a line where there are more than `MOST_LINES`."""
    numbers = sorted({record.round for record in result.stages})
    width = -(-len(numbers) // MOST_LINES) or 1
    blocks = [numbers[start : start + width] for start in range(0, len(numbers), width)]
    return tuple(_round_line(result, block) for block in blocks)


def failures(result: StudyResult) -> tuple[FailureLine, ...]:
    """Failures by site, with equal ones in one line."""
    seen: dict[tuple[str, str, str, str], list[int]] = {}
    for record in result.stages:
        for failure in record.failures:
            key = (failure.site, record.stage, failure.code, failure.reason)
            seen.setdefault(key, []).append(record.round)
    return tuple(
        FailureLine(site, spans(rounds), stage, code, reason)
        for (site, stage, code, reason), rounds in sorted(seen.items())
    )


def spans(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as `1–3, 7`."""
    parts = []
    for _, group in groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(parts)


def _round_line(result: StudyResult, block: Sequence[int]) -> RoundLine:
    """The line of one block of rounds."""
    records = [record for record in result.stages if record.round in block]
    losses = [v for r in records if (v := _mean(r, "loss")) is not None]
    shared = [record for record in records if record.owner is None]
    dices = [v for r in shared if (v := _mean(r, "mean_dice")) is not None]
    return RoundLine(
        rounds=spans(block),
        traffic=traffic(records, "round"),
        loss=losses[-1] if losses else None,
        dice=dices[-1] if dices else None,
        failures=sum(len(record.failures) for record in records),
    )


def _mean(record: StageRecord, what: str) -> float | None:
    """Mean over the answers of a stage, weighted by patients."""
    pairs = ((getattr(answer, what), answer.patients) for answer in record.answers)
    return weighted_mean(pairs)
