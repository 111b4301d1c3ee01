"""`fedseg-site check` and `fedseg-site cache`: look at a cohort, forget prepared copies of it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedseg.errors import DataError
from fedseg.plan import load_plan
from fedseg.shell import progress_bar
from fedseg.task import Task

if TYPE_CHECKING:
    from fedseg.imaging.findings import Finding
    from fedseg.imaging.manifests import ListedManifest
    from fedseg.imaging.quality import CaseSummary, Inspection

CHECK_EPILOG = """
Examples:

  fedseg-site check /data/hippocampus

  fedseg-site check /data/liver --plan study.yaml --html check.html

  fedseg-site check /data/liver --table sites_iid.csv --json > check.json
"""
MAX_LABELS_SHOWN = 4
WIDTH = 150

cache = typer.Typer(no_args_is_help=True, help="Prepared copies of cases on disk.")


def check(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Data folder: NIfTI with sites.csv, a Decathlon or nnU-Net dataset.json, "
            "images/ and labels/ alone, or DICOM.",
        ),
    ],
    plan: Annotated[
        Path | None, typer.Option(help="Study plan to check against; without it, one is guessed.")
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="CSV in DIR to use instead of sites.csv.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with label overlays (shows patients).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Inspect a cohort before anything is trained: each finding with case, problem and remedy.

    DIR holds NIfTI with sites.csv, a Decathlon or nnU-Net dataset.json, images/ and labels/
    alone, or DICOM series. A labels.yaml in it says what its label values mean.

    Exit status 0 only when all is well: no errors, no warnings, at least one case.
    """
    from fedseg.imaging.check_page import MAX_PICTURES, render_check_page
    from fedseg.imaging.quality import inspect

    folder = folder.absolute()
    manifest, task, notes = _read(folder, plan, table)
    with progress_bar("Inspecting", len(manifest.cases)) as advance:
        inspection = inspect(manifest, task, advance)
    inspection = replace(inspection, findings=(*inspection.findings, *notes))
    if html is not None:
        with progress_bar("Drawing", min(len(manifest.cases), MAX_PICTURES)) as advance:
            page = render_check_page(
                inspection, manifest, task, made_at=datetime.now().astimezone(), progress=advance
            )
        _write_private(html, page)
    if json:
        typer.echo(inspection.to_json())
    else:
        _print(inspection, task, guessed=plan is None, html=html)
    raise typer.Exit(0 if inspection.ok else 1)


@cache.command("purge")
def purge_cache(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The cache folder to empty.")],
) -> None:
    """Delete the prepared cases in a cache folder; they are patient data.

    Example: fedseg-site cache purge /var/lib/fedseg/cache
    """
    from fedseg.imaging.cache import purge

    freed = purge(folder)
    typer.echo(f"{freed / 1e6:.1f} MB of prepared cases deleted")


def _read(
    folder: Path, plan: Path | None, table: str | None
) -> tuple[ListedManifest, Task, tuple[Finding, ...]]:
    """The manifest, the plan's task or a guessed one, and what guessing met."""
    from fedseg.imaging.guess import guess_task
    from fedseg.imaging.manifests import survey

    if plan is not None:
        task = load_plan(plan).task
        return survey(folder, task, table=table), task, ()
    guess = guess_task(folder, table)
    manifest = survey(folder, guess.task, table=table)
    if guess.label_map and not manifest.label_map:
        manifest = replace(manifest, label_map=guess.label_map)
    return manifest, guess.task, guess.findings


def _print(inspection: Inspection, task: Task, *, guessed: bool, html: Path | None) -> None:
    """Findings first, then the cohort, then the verdict."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if guessed:
        channels = ", ".join(f"{c.name} ({c.modality})" for c in task.channels)
        labels = ", ".join(list(task.labels)[:8]) + (", ..." if len(task.labels) > 8 else "")
        console.print(
            f"No plan given: checked as {channels} with labels {labels}.", style="dim", markup=False
        )
    if inspection.findings:
        console.print(_findings_table(inspection.findings))
    if inspection.table:
        console.print(_cohort_table(inspection.table))
    errors = sum(f.severity == "error" for f in inspection.findings)
    warnings = len(inspection.findings) - errors
    counted = f"{_count(inspection.patients, 'patient')}, {_count(inspection.cases, 'case')}"
    if inspection.ok:
        console.print(f"All is well: {counted}.", style="bold green")
    elif not inspection.cases and not inspection.findings:
        console.print("There is no case to train on.", style="bold red")
    else:
        colour = "bold red" if errors else "bold yellow"
        console.print(
            f"{counted}: {_count(errors, 'error')}, {_count(warnings, 'warning')}.", style=colour
        )
    if html is not None:
        console.print(f"Page: {html} (it shows patients: keep it inside)", markup=False)


def _findings_table(findings: tuple[Finding, ...]) -> Table:
    """Case, problem and remedy of every finding."""
    table = Table(title="Findings", title_justify="left", show_lines=True)
    for heading in ("Severity", "Case", "Problem", "What to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        colour = "red" if finding.severity == "error" else "yellow"
        table.add_row(
            f"[{colour}]{finding.severity}[/{colour}]",
            _plain(finding.case or "whole folder"),
            _plain(finding.problem),
            _plain(finding.remedy),
        )
    return table


def _cohort_table(summaries: tuple[CaseSummary, ...]) -> Table:
    """One line a readable case."""
    table = Table(title="Cohort", title_justify="left")
    for heading in ("Patient", "Case", "Site", "Split"):
        table.add_column(heading, overflow="fold")
    for heading in ("Shape", "Spacing, mm", "Intensity p1 / p50 / p99", "Label volumes, ml"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in summaries:
        table.add_row(
            *(_plain(text) for text in (row.patient, row.case, row.site, row.split)),
            " x ".join(str(n) for n in row.shape),
            " x ".join(f"{mm:.3g}" for mm in row.spacing_mm),
            "\n".join(" / ".join(f"{v:.4g}" for v in channel) for channel in row.intensity),
            _plain(_volumes(row)),
        )
    return table


def _volumes(row: CaseSummary) -> str:
    """Label volumes of a case, the first few by name."""
    if row.label_ml is None:
        return "none"
    there = [f"{name} {ml:.3g}" for name, ml in row.label_ml.items() if ml]
    more = len(there) - MAX_LABELS_SHOWN
    return (
        ", ".join(there[:MAX_LABELS_SHOWN]) + (f" and {more} more" if more > 0 else "") or "empty"
    )


def _count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _plain(text: str) -> str:
    """Text from the data, without rich's markup and without control characters."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "?" for c in text))


def _write_private(path: Path, text: str) -> None:
    """Write a page that shows patients: readable by its owner only."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        path.chmod(0o600)
    except OSError as error:
        raise DataError(f"cannot write the page ({error.strerror}): name another file") from None
