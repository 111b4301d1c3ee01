"""The page that `fedseg-coordinator status` shows: a head of facts and a row a site."""

from __future__ import annotations

from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coordinator.dashboard.words import dice, duration, labels, mean, patients
from coordinator.progress.document import Progress
from coordinator.progress.tally import Sighting, SiteProgress
from coordinator.running.control import Snapshot
from fedseg.aggregation.suspicions import NOISY, sentence
from fedseg.result import stage_words

_STYLES = {"running": "green", "finished": "bold green", "not running": "red", "failed": "red"}
_NOTHING = "–"


def page(seen: Snapshot, now: datetime) -> RenderableType:
    """A study's status."""
    parts: list[RenderableType] = [_head(seen), Text(), _sites(seen, now)]
    troubles = [seen.daemon.trouble] if seen.daemon and seen.daemon.trouble else []
    if seen.progress is not None and seen.progress.note:
        troubles.append(seen.progress.note)
    troubles += _standing_out(seen.progress) if seen.progress else []
    parts += [Text(f"\n{text}", style="yellow") for text in (*troubles, *seen.warnings)]
    return Group(*parts)


def _standing_out(progress: Progress) -> list[str]:
    """Whose updates are unlike the others'."""
    said = [sentence(site, reasons) for site, reasons in progress.suspicions.items()]
    return [f"{text} {NOISY}" for text in said] if progress.private else said


def _head(seen: Snapshot) -> Table:
    """Study, phase, rounds, Dice and time left."""
    head = Table.grid(padding=(0, 2))
    head.add_row("Study", Text(seen.study, style="bold"))
    head.add_row("State", Text(seen.doing, style=_STYLES.get(seen.doing, "yellow")))
    head.add_row("Sites dial", seen.address)
    if seen.progress is not None:
        head.add_row("Privacy", _guarantee(seen.progress))
        head.add_row("Rounds", _rounds(seen.progress))
        head.add_row("Dice", _last_dice(seen.progress))
        head.add_row(
            "Time left", "done" if seen.progress.finished else duration(seen.progress.left_s)
        )
    if seen.daemon is not None:
        head.add_row("Programs", _programs(seen))
    return head


def _guarantee(progress: Progress) -> Text:
    """What the plan promises to patients; loudly where that is nothing."""
    if progress.private:
        return Text(progress.guarantee)
    return Text(progress.guarantee.replace("None:", "NONE:", 1) or _NOTHING, style="bold red")


def _rounds(progress: Progress) -> str:
    """Closed of all, and the open stage with who has not answered yet."""
    said = f"{progress.rounds_closed} of {progress.rounds} closed"
    if progress.open is None:
        return said
    stage = progress.open
    again = f", attempt {stage.attempt}" if stage.attempt > 1 else ""
    waiting = f"; waits for {', '.join(stage.waiting_for)}" if stage.waiting_for else ""
    where = f"round {stage.round}, " if stage.round else ""
    return f"{said}; {where}{stage_words(stage.stage, stage.owner)}{again}{waiting}"


def _last_dice(progress: Progress) -> str:
    """The newest mean Dice."""
    measured = [stage for stage in progress.stages if stage.dice is not None]
    if not measured:
        return mean(None, "metrics", progress)
    return f"{measured[-1].dice:.3f} after round {measured[-1].round}"


def _programs(seen: Snapshot) -> str:
    """Every supervised program and how often it was restarted."""
    assert seen.daemon is not None
    said = [
        f"{program.name} {'up' if program.ready else 'starting' if program.pid else 'down'}"
        + (f" ({program.restarts} restarts)" if program.restarts else "")
        for program in seen.daemon.programs
    ]
    if seen.daemon.run:
        working = "works" if seen.daemon.run_pid else "done" if seen.daemon.finished else "starts"
        said.append(f"run {seen.daemon.run} {working}")
    return ", ".join(said)


def _sites(seen: Snapshot, now: datetime) -> RenderableType:
    """A row a site: who is enrolled, on line, has answered and how well."""
    told = {site.name: site for site in seen.progress.sites} if seen.progress else {}
    nodes = {node.site: node for node in seen.daemon.nodes} if seen.daemon else {}
    if not told and not nodes:
        return Text(
            "No site is on line yet: `fedseg-coordinator sites` says who is enrolled", style="dim"
        )
    partial = any(site.labels is not None for site in told.values())
    table = Table("Site", "On line", "Last seen", header_style="bold", box=None, pad_edge=False)
    for column in ("Patients", "Dice", "Answers", "Failed"):
        table.add_column(column, justify="right")
    if partial:
        table.add_column("Labels annotated")
    for name in sorted({*told, *nodes}):
        site, node = told.get(name) or SiteProgress(name=name, sighting=Sighting()), nodes.get(name)
        online = node.online if node else site.sighting.online
        last = (node.last_seen if node else None) or site.sighting.last_seen
        table.add_row(
            name,
            _NOTHING if online is None else Text("yes", "green") if online else Text("no", "red"),
            "now" if online else _ago(last, now),
            patients(site, seen.progress) if seen.progress else _NOTHING,
            dice(site, seen.progress) if seen.progress else _NOTHING,
            str(site.answers),
            _failed(site),
            *([labels(site)] if partial else []),
        )
    return table


def _failed(site: SiteProgress) -> str:
    """How often, and the last reason's code."""
    return f"{site.failures} ({site.last_failure.code})" if site.last_failure else "0"


def _ago(moment: str | None, now: datetime) -> str:
    """How long ago."""
    if not moment:
        return "never"
    return f"{duration((now - datetime.fromisoformat(moment)).total_seconds())} ago"
