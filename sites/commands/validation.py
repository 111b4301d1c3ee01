"""`fedseg-site validate`: compare models on this hospital's held-back patients."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedseg.commands.models import Device
from fedseg.errors import DataError
from fedseg.shell import progress_bar
from sites.commands.models import model_file
from sites.commands.options import HERE, SiteOption
from sites.commands.own_data import (
    CacheOption,
    RowOption,
    TableOption,
    cache_or_temporary,
    house_at,
)
from sites.rights import as_owner_of

if TYPE_CHECKING:
    from fedseg.evaluation.evidence import Estimate
    from fedseg.evaluation.thresholds import Thresholds
    from fedseg.evaluation.validation import ValidationResult
    from sites.heldback import House
    from sites.policy import Policy
    from sites.validating import Entrant

VALIDATE_EPILOG = """
Examples:

  fedseg-site validate lung lung-finetuned --site /var/lib/fedseg

  fedseg-site validate lung --local own.safetensors --lesions nodule --site /var/lib/fedseg

  fedseg-site validate OUT/model.safetensors --data DIR --row hospital_a --out validation
"""
SUPPRESS_BELOW = 5
UNAPPROVED = (
    "the patients are of a folder that was named with --data, not those approved with the study's "
    "plan: that no model was trained on them is taken from the folder's own splits"
)
_COLOURS = {"go": "bold green", "no-go": "bold red", "undecided": "bold yellow"}


def validate(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="Files, or the names of those in models/."),
    ] = None,
    local: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="A model trained here alone.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A data folder; by default the one approved with the first MODEL's plan."
        ),
    ] = None,
    table: TableOption = None,
    row: RowOption = None,
    lesions: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="This label is lesions, to be counted; repeatable."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=1e-3, metavar="MM", help="Of surface Dice; by default the plan's."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="policy.yaml with thresholds, where there is no site.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result, where there is no site.")
    ] = None,
    cache: CacheOption = None,
    device: Device = "cpu",
    site: SiteOption = HERE,
) -> None:
    """Measure models on patients whom none of them was trained on, and compare them in pairs.

    They are the labelled patients of `test`, or of `val` where test has none. The thresholds of
    the section `acceptance` in policy.yaml decide: go, no-go, or undecided. Result and page name
    patients and stay here. Stopped, it goes on with what it has measured.
    """
    from fedseg.models.devices import require_device
    from sites.audit import utc_now
    from sites.heldback import Source, held_back
    from sites.validating import Wanted, entrants, keep, validate_here

    house, created = house_at(site, data), utc_now()
    if house is not None and (policy or out or cache):
        raise DataError(
            "--policy, --out and --cache are for a data folder without a site: a site's own are in "
            "its folder"
        )
    require_device(device)
    found = entrants([model_file(name, site) for name in models or []], local)
    rules = _rules(house.folder.policy if house else policy)
    wanted = Wanted(
        lesions=tuple(dict.fromkeys(lesions or ())),
        tolerance_mm=tolerance,
        thresholds=rules.acceptance,
        suppress_below=rules.suppress_below or SUPPRESS_BELOW,
    )
    patients = held_back(
        {each.candidate.name: each.header for each in found},
        Source(data.absolute() if data else None, table, row),
        house,
        lambda cases: progress_bar("inspecting", cases),
    )
    total = len(found) * len(patients.cohort.cases)
    with ExitStack() as stack:
        if house is not None:
            places = _at_site(house, found, wanted.thresholds, created, stack)
        else:
            places = _without_site(out or Path("validation"), cache, stack)
        unapproved = house is not None and data is not None
        notes = (*places.notes, *patients.notes, *((UNAPPROVED,) if unapproved else ()))
        advance = stack.enter_context(progress_bar("measuring", total))
        result, overlays = validate_here(
            found, patients, wanted,
            site=patients.cohort.site, cache=places.cache, measured=places.measured,
            device=device, created=created, notes=notes, progress=advance,
        )  # fmt: skip
        keep(result, overlays, found, places.result, house)
    _show(result, places.result)


@dataclass(frozen=True)
class _Places:
    """Where things are kept, and what is to be said of the thresholds."""

    result: Path
    measured: Path
    cache: Path
    notes: tuple[str, ...] = ()


def _at_site(
    house: House,
    found: tuple[Entrant, ...],
    thresholds: Thresholds | None,
    created: str,
    stack: ExitStack,
) -> _Places:
    """In the site's folder, as its owner."""
    from sites.validating import MEASURED, new_place, thresholds_moved

    folder = house.folder
    stack.enter_context(as_owner_of(folder.validations))
    return _Places(
        result=new_place(folder, found[0].candidate.study, created),
        measured=folder.validations / MEASURED,
        cache=folder.cache,
        notes=thresholds_moved(folder, found, thresholds),
    )


def _without_site(out: Path, cache: Path | None, stack: ExitStack) -> _Places:
    """In a folder of somebody without a site."""
    from sites.validating import MEASURED, RESULT

    if (out / RESULT).exists():
        raise DataError(f"{out.name} has a {RESULT} already: name another folder with --out")
    return _Places(out, out / MEASURED, cache_or_temporary(cache, stack))


def _rules(path: Path | None) -> Policy:
    """The hospital's policy; where none is named, one without thresholds."""
    from sites.policy import Policy, load_policy

    return Policy() if path is None else load_policy(path)


def _show(result: ValidationResult, place: Path) -> None:
    """Warnings, numbers, verdict: in this order."""
    console = Console(soft_wrap=True, highlight=False)
    for words in result.warnings:
        console.print(f"[yellow]![/] {escape(words)}")
    console.print(_numbers(result), soft_wrap=False)
    for each in result.comparisons:
        if each.outcome is not None:
            p = _rounded(each.p_adjusted)
            console.print(
                f"{each.a} less {each.b}: Dice {_shown(each.difference, 3)}, p {p} (Holm): "
                f"{each.outcome}",
                markup=False,
            )
    verdict = result.verdict
    named = f": {escape(verdict.recommended)}" if verdict.recommended else ""
    console.print(f"[{_COLOURS[verdict.decision]}]{verdict.decision}[/]{named}")
    for reason in verdict.reasons:
        console.print(f"  - {reason}", markup=False)
    console.print(f"result and page (they name patients): {place}", markup=False)


def _numbers(result: ValidationResult) -> Table:
    """A column a model; where the terminal is narrow names and numbers wrap, and nothing is cut."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for summary in result.summaries:
        table.add_column(escape(summary.candidate), overflow="fold")
    every = [*zip(result.summaries, result.calibration, strict=True)]
    table.add_row("patients", *(str(each.patients) for each, _ in every))
    table.add_row("Dice", *(_shown(each.dice, 3) for each, _ in every))
    table.add_row("worst", *(_rounded(each.worst_dice) for each, _ in every))
    table.add_row("HD95 mm", *(_shown(each.hd95_mm, 1) for each, _ in every))
    table.add_row("NSD", *(_shown(each.nsd, 3) for each, _ in every))
    table.add_row("failed", *(str(each.failed) for each, _ in every))
    table.add_row("ECE", *(_shown(calibration.error, 3) for _, calibration in every))
    return table


def _rounded(value: float | None) -> str:
    """To three digits."""
    return "-" if value is None else f"{value:.3f}"


def _shown(estimate: Estimate, digits: int) -> str:
    """A mean with its interval."""
    if estimate.mean is None:
        return "-"
    mean = f"{estimate.mean:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"
