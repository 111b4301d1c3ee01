"""The page: what a progress document says, drawn on the server; the script only swaps sections.

Everything from the study is escaped. The same document and the same situation give the same bytes,
so a browser that asks again is told that nothing changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from coordinator.dashboard import words
from coordinator.dashboard.charts import Chart, Curve
from coordinator.dashboard.notices import Situation, notices
from coordinator.progress.document import Progress
from coordinator.progress.tally import FailureEntry, RoundValue, SiteProgress, StageProgress
from fedseg.plan import StudyPlan
from fedseg.privacy.words import in_one_line, not_covered, outputs_of
from fedseg.reports import crosssite, ownmodels
from fedseg.reports.crosssite import CrossSite, SiteScore
from fedseg.reports.ownmodels import OwnModels

LOOKS = 8
MOST_ROUNDS = 10
MOST_FAILURES = 40
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class FailureLine:
    """One kind of failure of one site, and the rounds in which it happened; `at` is the last."""

    site: str
    rounds: str
    stage: str
    code: str
    what: str
    advice: str
    at: str | None


@dataclass(frozen=True)
class RoundLine:
    """All stages of one round; `answered` of `asked` hospitals in its last training."""

    round: int
    answered: int
    asked: int
    attempts: int
    loss: float | None
    dice: float | None
    bytes_down: int
    bytes_up: int
    wall_s: float | None
    closed: str | None


def environment() -> Environment:
    """The templates, with everything escaped that is not markup of theirs."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "amount": words.amount,
        "duration": words.duration,
        "moment": words.moment,
        "number": words.number,
        "count": words.count,
        "patients": words.patients,
        "dice": words.dice,
        "mean": words.mean,
        "coded": coded,
    }
    return made


def render(plan: StudyPlan, progress: Progress | None, situation: Situation) -> str:
    """The whole page."""
    return environment().get_template("page.html").render(content(plan, progress, situation))


def content(plan: StudyPlan, progress: Progress | None, situation: Situation) -> dict[str, Any]:
    """All that the template shows."""
    shared = {
        "plan": plan,
        "progress": progress,
        "notices": notices(progress, situation),
        "guarantee": in_one_line(plan),
        "not_covered": not_covered(plan),
        "outputs": outputs_of(plan),
    }
    if progress is None:
        return shared | {"headline": "This study has not started yet", "lead": ""}
    rounds = round_lines(progress.stages)[::-1]
    return shared | {
        "headline": words.headline(progress),
        "lead": words.answered_line(progress.open) if progress.open else progress.note,
        "dice": _last(progress.stages, "dice"),
        "online": sum(site.sighting.online is True for site in progress.sites),
        "now_of": {site.name: _doing(site, progress) for site in progress.sites},
        "looks": _looks(progress.sites),
        "charts": charts(progress),
        "across": _across(plan, progress),
        "recent": rounds[:MOST_ROUNDS],
        "older": rounds[MOST_ROUNDS:],
        "failures": failure_lines(progress)[:MOST_FAILURES],
        "bytes_down": sum(stage.bytes_down for stage in progress.stages),
        "bytes_up": sum(stage.bytes_up for stage in progress.stages),
    }


def last_measured(progress: Progress) -> CrossSite | None:
    """The last model that hospitals measured, over the hospitals; None before the first."""
    last = next((s for s in reversed(progress.stages) if s.stage == "evaluate"), None)
    if last is None:
        return None
    scores = [_score(site, last) for site in progress.sites]
    return crosssite.compared(scores, round_=last.round)


def own_models(plan: StudyPlan, progress: Progress) -> OwnModels | None:
    """Hospitals' own models over the hospitals; None while the first is still to be measured."""
    last = [
        stage
        for stage in progress.stages
        if (stage.round, stage.stage) == (progress.rounds, "train")
        and len(stage.answered) >= progress.minimum_sites  # else it is tried again
    ]
    found = {
        stage.owner: [_told(site, stage) for site in progress.sites]
        for stage in progress.stages
        if stage.owner is not None
    }
    if not plan.evaluation.own_models or not last or (last[-1].let_go and not found):
        return None
    let_go = {site: site in last[-1].let_go for site in last[-1].answered}
    everyone = [site.name for site in progress.sites]
    return ownmodels.gathered(found, let_go, everyone, progress.rounds)


def charts(progress: Progress) -> tuple[Chart, ...]:
    """Dice and loss by round, as far as the sites sent them."""
    made = (
        Chart(
            "dice",
            "Dice on held-back patients",
            "Overlap with the segmentation drawn by hand: 0 is none, 1 is identical.",
            _curves(progress, "dice"),
            progress.rounds if progress.rounds <= 40 else max(2, progress.rounds_closed),
        ),
        Chart(
            "loss",
            "Training loss",
            "Smaller is better.",
            _curves(progress, "loss"),
            progress.rounds if progress.rounds <= 40 else max(2, progress.rounds_closed),
            starts_at=0.0,
        ),
    )
    return tuple(chart for chart in made if chart.curves)


def round_lines(stages: Sequence[StageProgress]) -> tuple[RoundLine, ...]:
    """Closed stages by round, in order; a round that is not over is there as far as it got."""
    by_round: dict[int, list[StageProgress]] = {}
    for stage in stages:
        by_round.setdefault(stage.round, []).append(stage)
    return tuple(_round_line(round_, own) for round_, own in sorted(by_round.items()))


def coded(text: str) -> Markup:
    """Text with `commands` between backticks, as markup."""
    parts = text.split("`")
    kinds = cycle((Markup("{}"), Markup("<code>{}</code>")))
    return Markup("").join(kind.format(part) for kind, part in zip(kinds, parts, strict=False))


def failure_lines(progress: Progress) -> tuple[FailureLine, ...]:
    """Failures with equal ones in one line, the latest first."""
    entries = [entry for stage in progress.stages for entry in _entries(stage)]
    entries += progress.open.failures if progress.open else ()
    order = {id(entry): place for place, entry in enumerate(entries)}
    key = _kind_of
    lines = []
    for (site, stage, code), group in groupby(sorted(entries, key=key), key):
        same = list(group)
        what, advice = words.code_words(code)
        rounds = words.spans(entry.round for entry in same if entry.round) or "–"
        last = max(same, key=lambda entry: order[id(entry)])
        line = FailureLine(
            site, rounds, words.STAGES.get(stage, stage), code, what, advice, last.at
        )
        lines.append((order[id(last)], line))
    return tuple(line for _, line in sorted(lines, key=lambda pair: -pair[0]))


def _round_line(round_: int, stages: Sequence[StageProgress]) -> RoundLine:
    """One round."""
    main = next((s for s in reversed(stages) if s.stage == "train"), stages[-1])
    times = [s.timing.wall_s for s in stages if s.timing.wall_s is not None]
    loss, dice = _last(stages, "loss"), _last(stages, "dice")
    return RoundLine(
        round=round_,
        answered=len(main.answered),
        asked=len(main.answered) + len(main.failures),
        attempts=main.attempt,
        loss=loss[1] if loss else None,
        dice=dice[1] if dice else None,
        bytes_down=sum(s.bytes_down for s in stages),
        bytes_up=sum(s.bytes_up for s in stages),
        wall_s=sum(times) if times else None,
        closed=stages[-1].timing.closed,
    )


def _entries(stage: StageProgress) -> Iterable[FailureEntry]:
    """A closed stage's failures, each with its place."""
    for failure in stage.failures:
        yield FailureEntry(
            round=stage.round,
            stage=stage.stage,
            attempt=stage.attempt,
            site=failure.site,
            code=failure.code,
            reason=failure.reason,
            at=stage.timing.closed,
        )


def _kind_of(entry: FailureEntry) -> tuple[str, str, str]:
    """What makes two failures the same."""
    return entry.site, entry.stage, entry.code


def _across(plan: StudyPlan, progress: Progress) -> dict[str, Any] | None:
    """What the section on the hospitals' differences shows."""
    found = last_measured(progress)
    if found is None:
        return None
    noised = plan.privacy.outputs.metrics == "noised"
    found = replace(found, noised=noised)
    return {
        "found": found,
        "said": crosssite.sentences(found),
        "standing": crosssite.STANDING_WORDS,
        "own": ownmodels.sentences(plan, own_models(plan, progress)),
    }


def _score(site: SiteProgress, last: StageProgress) -> SiteScore:
    """One hospital in the last measuring."""
    told = [point.value for point in site.dice if point.round == last.round]
    if told:
        return SiteScore(site.name, "measured", {"dice": told[-1]})
    return SiteScore(site.name, "withheld" if site.name in last.answered else "absent", {})


def _told(site: SiteProgress, stage: StageProgress) -> SiteScore:
    """One hospital in the measuring of an own model."""
    value = stage.own_dice.get(site.name)
    if value is not None:
        return SiteScore(site.name, "measured", {"dice": value})
    return SiteScore(site.name, "withheld" if site.name in stage.answered else "absent", {})


def _curves(progress: Progress, what: str) -> tuple[Curve, ...]:
    """One curve a site that has values, and their mean last."""
    looks = _looks(progress.sites)
    own = [
        Curve(site.name, looks[site.name], _points(getattr(site, what))) for site in progress.sites
    ]
    mean = {s.round: v for s in progress.stages if (v := getattr(s, what)) is not None}
    if not mean:
        return ()
    return (*(curve for curve in own if curve.points), Curve("Mean", "mean", tuple(mean.items())))


def _points(values: Sequence[RoundValue]) -> tuple[tuple[int, float], ...]:
    """As the chart takes them."""
    return tuple((value.round, value.value) for value in values)


def _looks(sites: Sequence[SiteProgress]) -> dict[str, str]:
    """Each site's colour, the same in every chart."""
    return {site.name: f"look{place % LOOKS}" for place, site in enumerate(sites)}


def _last(stages: Sequence[StageProgress], what: str) -> tuple[int, float] | None:
    """The newest mean and its round."""
    found = [(s.round, v) for s in stages if (v := getattr(s, what)) is not None]
    return found[-1] if found else None


def _doing(site: SiteProgress, progress: Progress) -> tuple[str, str]:
    """What a site does in the open stage: a class of the style, and words."""
    stage = progress.open
    if stage is None:
        return "idle", "–"
    if site.name in stage.answered:
        return "done", "Answered"
    failed = next((f for f in stage.failures if f.site == site.name), None)
    if failed:
        return "bad", words.code_words(failed.code)[0]
    if site.sighting.online is False:
        return "idle", "Waited for"
    return "busy", {"train": "Training", "evaluate": "Measuring", "own": "Measuring"}.get(
        stage.stage, "Waited for"
    )
