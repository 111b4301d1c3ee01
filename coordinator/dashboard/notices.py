"""What a person should look at now, the most urgent first; nothing when all is well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Literal

from coordinator.dashboard.words import count, duration, listed
from coordinator.progress.document import Progress
from coordinator.progress.tally import OpenStage, StageProgress
from fedseg.aggregation.suspicions import NOISY, sentence

SLOW = 3.0
SLOW_AT_LEAST_S = 120.0


@dataclass(frozen=True)
class Situation:
    """What the document cannot say of itself.

    Attributes:
        working: does a run work on the study, or was one heard of lately?
        daemon: does the coordinator's daemon run, which starts a run where none is?
        paused: was the study asked to pause?
        damaged: why the document could not be read.
        open_s: for how long the open stage has been open.
        ending: sentences about what ends soon or has ended: certificates, the roll.
    """

    working: bool = True
    daemon: bool = True
    paused: bool = False
    damaged: str = ""
    open_s: float = 0.0
    ending: tuple[str, ...] = ()


@dataclass(frozen=True)
class Notice:
    """One thing to look at. `stop`: the study stands still; `look`: it may; `know`: it goes on."""

    level: Literal["stop", "look", "know"]
    what: str
    advice: str = ""


def notices(progress: Progress | None, situation: Situation) -> tuple[Notice, ...]:
    """All that is to be said, the most urgent first."""
    if situation.damaged:
        return (Notice("stop", "The study's progress cannot be read.", situation.damaged),)
    found = [Notice("look", f"{text[:1].upper()}{text[1:]}.") for text in situation.ending]
    if progress is not None and progress.finished:
        found += _undelivered(progress)
    elif progress is not None:
        found += (*_standing(progress, situation), *_stage(progress, situation), *_away(progress))
    found += _standing_out(progress) if progress is not None else ()
    order = ("stop", "look", "know")
    return tuple(sorted(found, key=lambda notice: order.index(notice.level)))


def _standing(progress: Progress, situation: Situation) -> Iterator[Notice]:
    """Is anybody at work?"""
    if progress.phase == "failed":
        yield Notice("stop", "The study stopped.", progress.note)
    elif not situation.working:
        yield _nobody(situation.daemon)
    elif situation.paused and progress.phase != "paused":
        yield Notice("know", "The study pauses once the open stage is closed.")


def _nobody(daemon: bool) -> Notice:
    """No run works on the study."""
    what = "Nothing works on this study at the moment."
    if daemon:
        return Notice("look", what, "The coordinator starts it again from the last checkpoint.")
    remedy = "Start it with `fedseg-coordinator run`; it goes on from the last checkpoint."
    return Notice("stop", what, remedy)


def _stage(progress: Progress, situation: Situation) -> Iterator[Notice]:
    """Does the open stage go as it should?"""
    stage = progress.open
    if stage is None:
        return
    if stage.attempt > 1:
        last = stage.attempt >= progress.attempts
        yield Notice(
            "look",
            f"Too few hospitals answered before: this is attempt {stage.attempt} of "
            f"{progress.attempts}.",
            f"{count(progress.minimum_sites, 'hospital')} must answer"
            + (", or the study stops." if last else "."),
        )
    possible = len(stage.answered) + len(stage.waiting_for)
    if stage.stage not in ("evaluate", "own") and possible < progress.minimum_sites:
        yield Notice(
            "look",
            f"{count(progress.minimum_sites, 'hospital')} must answer, and only {possible} can.",
            "The stage will be tried again.",
        )
    usual = _usual(stage, progress.stages)
    if usual and situation.open_s > max(SLOW_AT_LEAST_S, SLOW * usual):
        waited = f" Still waited for: {listed(stage.waiting_for)}." if stage.waiting_for else ""
        yield Notice("look", f"This usually takes {duration(usual)}, and now far longer.{waited}")


def _away(progress: Progress) -> Iterator[Notice]:
    """Who is not on line?"""
    away = [site.name for site in progress.sites if site.sighting.online is False]
    if away:
        are = "is" if len(away) == 1 else "are"
        yield Notice(
            "look",
            f"{listed(away)} {are} not on line.",
            "The hospital's IT finds out more with `fedseg-site status`.",
        )


def _standing_out(progress: Progress) -> Iterator[Notice]:
    """Whose updates are unlike the others'?"""
    for site, reasons in progress.suspicions.items():
        yield Notice("look", sentence(site, reasons), NOISY if progress.private else "")


def _undelivered(progress: Progress) -> Iterator[Notice]:
    """To whom has the final model not come?"""
    if progress.stages and (last := progress.stages[-1]).stage == "release":
        lacking = [site.name for site in progress.sites if site.name not in last.answered]
        if lacking:
            what = f"The final model has not reached {listed(lacking)} yet."
            yield Notice("know", what, "It is offered again as soon as they are on line.")


def _usual(stage: OpenStage, stages: tuple[StageProgress, ...]) -> float | None:
    """How long such a stage usually takes."""
    times = [s.timing.wall_s for s in stages if s.stage == stage.stage and s.timing.wall_s]
    return median(times) if times else None
