"""A running study in a terminal: which round, which site, loss and Dice, and the time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from coordinator.rounds.events import SiteAnswered, SiteFailed, StageClosed, StageOpened
from fedseg.plan import StudyPlan
from fedseg.privacy.words import in_one_line, outputs_of
from fedseg.result import stage_words
from fedseg.simulation.options import Progress as StudyProgress


class Display:
    """Shows a study's progress; one line a round where the output is no terminal."""

    def __init__(self, plan: StudyPlan, console: Console, *, seeded: bool = False) -> None:
        """Begin with what the study guarantees to patients.

        Args:
            seeded: the noise of a private plan comes from a seed, so that it guarantees nothing.
        """
        self._plan, self._console = plan, console
        self._withheld = {o.name for o in outputs_of(plan) if o.openness == "none"}
        if seeded:
            console.print("[bold red]NOT PRIVATE[/]: the noise of this run is seeded")
        elif plan.private:
            console.print(f"privacy: {in_one_line(plan)}", highlight=False)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("round {task.fields[round]} of {task.fields[rounds]}"),
            TextColumn("{task.fields[doing]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._sites: dict[str, dict[str, str]] = {}
        self._live = Live(self._bar, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, progress: StudyProgress) -> None:
        """Show one event."""
        event, arm = progress.event, progress.arm
        if isinstance(event, str):
            self._say(event)
            return
        if isinstance(event, StageOpened):
            self._show(arm, round_=event.round, doing=event.stage)
        elif isinstance(event, SiteAnswered):
            shown = self._sites.setdefault(event.answer.site, {})
            if event.answer.loss is not None:
                shown["loss"] = f"{event.answer.loss:.3f}"
            if event.answer.mean_dice is not None:
                shown["dice"] = f"{event.answer.mean_dice:.3f}"
            shown["state"] = f"answered {event.stage}"
        elif isinstance(event, SiteFailed):
            shown = self._sites.setdefault(event.failure.site, {})
            shown["state"] = f"[red]{event.stage}: {event.failure.code}"
        elif isinstance(event, StageClosed):
            self._close(arm, event)
        if arm == "federated":
            self._live.update(Group(self._bar, self._table()))

    def _show(self, arm: str, *, round_: int, doing: str, left: str = "") -> None:
        """Move an arm's bar."""
        if arm not in self._tasks:
            self._started[arm] = time.monotonic(), max(round_ - 1, 0)
            self._tasks[arm] = self._bar.add_task(
                arm,
                total=self._plan.aggregation.rounds,
                round=0,
                rounds=self._plan.aggregation.rounds,
                doing="",
                left="",
            )
        task = self._tasks[arm]
        closed = round_ if not doing else max(round_ - 1, 0)
        self._bar.update(task, completed=closed, round=round_, doing=doing)
        if left:
            self._bar.update(task, left=left)

    def _close(self, arm: str, event: StageClosed) -> None:
        """Count a closed stage; without a terminal, a line for it."""
        record = event.record
        rounds = self._plan.aggregation.rounds
        since, first = self._started.get(arm, (time.monotonic(), 0))
        left = (time.monotonic() - since) / max(record.round - first, 1) * (rounds - record.round)
        self._show(arm, round_=record.round, doing="", left=f"about {left:.0f} s left")
        if self._console.is_terminal or arm != "federated" or record.stage == "enlist":
            return
        dice = [a.mean_dice for a in record.answers if a.mean_dice is not None]
        loss = [a.loss for a in record.answers if a.loss is not None]
        parts = [f"round {record.round}/{rounds} {stage_words(record.stage, record.owner)}"]
        parts += [f"loss {sum(loss) / len(loss):.3f}"] if loss else []
        parts += [f"Dice {sum(dice) / len(dice):.3f}, worst {min(dice):.3f}"] if dice else []
        parts += [f"{f.site}: {f.code}" for f in record.failures]
        self._console.print("  ".join([*parts, f"about {left:.0f} s left"]))

    def _say(self, text: str) -> None:
        """Tell what is done beside the rounds; each case of a check would be too much."""
        if self._console.is_terminal:
            self._bar.console.print(f"[dim]{text}") if not text.startswith("checking ") else None
        elif not text.startswith("checking "):
            self._console.print(text)

    def _table(self) -> Table:
        """Every site's latest numbers."""
        table = Table(box=None, pad_edge=False)
        for heading in ("site", "loss", "Dice", ""):
            table.add_column(heading)
        for site, shown in sorted(self._sites.items()):
            if site == "pooled":
                continue
            loss = "withheld" if "losses" in self._withheld else shown.get("loss")
            dice = "withheld" if "metrics" in self._withheld else shown.get("dice")
            table.add_row(site, loss, dice, shown.get("state"))
        return table
