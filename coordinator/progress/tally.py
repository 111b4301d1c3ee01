"""A study's history counted up: by stage, by site, and how long the rest will take.

Pure: records of closed stages, the answers of the open one and when each site was seen go in,
values for people come out. A mean over sites weighs by patients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import get_args

from fedseg.aggregation.rounds import Position
from fedseg.frozen import Frozen
from fedseg.result import SiteAnswer, SiteFailure, StageRecord, weighted_mean
from fedseg.updates import StageName

RECENT = 5
COUNTED = ("enlist", "train")  # stages whose answers tell the training patients
NOT_ASKED = frozenset({"offline"})


class RoundValue(Frozen):
    """One point of a curve."""

    round: int
    value: float


class FailureEntry(Frozen):
    """A site that gave no usable answer: when, where in the study, and why."""

    round: int
    stage: str
    attempt: int
    site: str
    code: str
    reason: str
    at: str | None = None


class Timing(Frozen):
    """When a stage was closed and how long it was open; unknown (None) where a crash lost it."""

    closed: str | None = None
    wall_s: float | None = None


class StageProgress(Frozen):
    """One closed stage. `loss` and `dice` are means over the sites that answered.

    Attributes:
        owner: whose own model was measured; None where it was the shared one, or none.
        own_dice: of that model by site, None where a site withheld it; `dice` is None then.
        let_go: sites that let their own model go, in the training of the last round.
    """

    round: int
    stage: str
    attempt: int
    owner: str | None = None
    answered: tuple[str, ...]
    failures: tuple[SiteFailure, ...]
    loss: float | None
    dice: float | None
    own_dice: dict[str, float | None] = {}
    let_go: tuple[str, ...] = ()
    bytes_down: int
    bytes_up: int
    timing: Timing


class OpenStage(Frozen):
    """The running stage: `nodes` were asked, and these sites have answered, failed or not yet."""

    round: int
    stage: str
    attempt: int
    owner: str | None = None
    since: str
    nodes: int
    answered: tuple[str, ...] = ()
    failures: tuple[FailureEntry, ...] = ()
    waiting_for: tuple[str, ...] = ()


class Sighting(Frozen):
    """When a site was last on line, and when it last answered. `online` None: not known yet."""

    online: bool | None = None
    last_seen: str | None = None
    last_answer: str | None = None


class SiteProgress(Frozen):
    """One site over the whole study. Bytes count accepted answers and the tasks sent for them.

    `labels`: those of the plan that it annotates; None where that is all, or not known yet.
    """

    name: str
    sighting: Sighting
    patients: int | None = None
    labels: tuple[str, ...] | None = None
    answers: int = 0
    failures: int = 0
    last_failure: FailureEntry | None = None
    loss: tuple[RoundValue, ...] = ()
    dice: tuple[RoundValue, ...] = ()
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class Asked:
    """One site in one stage: what it answered, or how it failed."""

    record: StageRecord
    timing: Timing
    answer: SiteAnswer | None = None
    failure: SiteFailure | None = None


def stages_of(
    history: Sequence[StageRecord], timings: Sequence[Timing]
) -> tuple[StageProgress, ...]:
    """Every closed stage with its time, in order."""
    return tuple(
        StageProgress(
            round=record.round,
            stage=record.stage,
            attempt=record.attempt,
            owner=record.owner,
            answered=tuple(answer.site for answer in record.answers),
            failures=record.failures,
            loss=weighted_mean((a.loss, a.patients) for a in record.answers),
            dice=None if record.owner else _mean_dice(record),
            own_dice={a.site: a.mean_dice for a in record.answers} if record.owner else {},
            let_go=tuple(a.site for a in record.answers if a.own is not None),
            bytes_down=record.bytes_down,
            bytes_up=record.bytes_up,
            timing=timing,
        )
        for record, timing in _timed(history, timings)
    )


def sites_of(
    names: Iterable[str],
    history: Sequence[StageRecord],
    timings: Sequence[Timing],
    seen: Mapping[str, Sighting],
) -> tuple[SiteProgress, ...]:
    """Every site that is enrolled or took part, sorted by name.

    Args:
        history: closed stages, and the open one as far as it got.
    """
    parts: dict[str, list[Asked]] = {name: [] for name in sorted(names)}
    timed = _timed(history, timings)
    for record, timing in timed:
        for answer in record.answers:
            parts.setdefault(answer.site, []).append(Asked(record, timing, answer=answer))
    for record, timing in timed:
        for failure in record.failures:
            if failure.site in parts:  # a node that never enlisted has a number, and is no site
                parts[failure.site].append(Asked(record, timing, failure=failure))
    return tuple(_site(name, parts[name], seen.get(name, Sighting())) for name in sorted(parts))


def failure_entry(record: StageRecord, failure: SiteFailure, at: str | None) -> FailureEntry:
    """A failure with its place in the study."""
    return FailureEntry(
        round=record.round,
        stage=record.stage,
        attempt=record.attempt,
        site=failure.site,
        code=failure.code,
        reason=failure.reason,
        at=at,
    )


def seconds_left(
    ahead: Sequence[Position], stages: Sequence[StageProgress], open_s: float
) -> float | None:
    """How long the study will go on, if stages take as long as they lately did.

    Args:
        ahead: the stages that are open or to come, in order; none when the study is finished.
        open_s: how long the first of them has been open.

    Returns:
        Seconds, or None while no training stage was timed.
    """
    if not ahead:
        return 0.0
    usual = {
        kind: median(times[-RECENT:])
        for kind in get_args(StageName)
        if (times := [s.timing.wall_s for s in stages if s.stage == kind and s.timing.wall_s])
    }
    if "train" not in usual:
        return None
    times = [usual.get(position.stage, 0.0) for position in ahead]
    return max(0.0, times[0] - open_s) + sum(times[1:])


def _site(name: str, parts: Sequence[Asked], sighting: Sighting) -> SiteProgress:
    """One site's line."""
    answers = [(p.record, p.answer) for p in parts if p.answer]
    failures = [failure_entry(p.record, p.failure, p.timing.closed) for p in parts if p.failure]
    return SiteProgress(
        name=name,
        sighting=sighting,
        patients=next((a.patients for r, a in answers[::-1] if r.stage in COUNTED), None),
        labels=next((a.labels for r, a in answers[::-1] if r.stage == "enlist"), None),
        answers=len(answers),
        failures=len(failures),
        last_failure=failures[-1] if failures else None,
        loss=_curve((r.round, a.loss) for r, a in answers),
        dice=_curve((r.round, a.mean_dice) for r, a in answers if r.owner is None),
        bytes_down=sum(_share(p.record) for p in parts if not _never_asked(p)),
        bytes_up=sum(answer.bytes_up for _, answer in answers),
    )


def _mean_dice(record: StageRecord) -> float | None:
    """Mean over the sites that answered, by patients."""
    return weighted_mean((a.mean_dice, a.patients) for a in record.answers)


def _timed(
    history: Sequence[StageRecord], timings: Sequence[Timing]
) -> list[tuple[StageRecord, Timing]]:
    """Records with their times; those without one get an unknown time."""
    pairs = zip_longest(history, timings[: len(history)], fillvalue=None)
    return [(record, timing or Timing()) for record, timing in pairs if record is not None]


def _share(record: StageRecord) -> int:
    """Bytes of one site's task: all sites are sent the same."""
    failed = sum(failure.code not in NOT_ASKED for failure in record.failures)
    return record.bytes_down // max(1, len(record.answers) + failed)


def _never_asked(part: Asked) -> bool:
    """Was the site away when the task went out?"""
    return part.failure is not None and part.failure.code in NOT_ASKED


def _curve(points: Iterable[tuple[int, float | None]]) -> tuple[RoundValue, ...]:
    """The points that have a value; a round that was trained again counts with its last."""
    known = {round_: value for round_, value in points if value is not None}
    return tuple(RoundValue(round=round_, value=value) for round_, value in known.items())
