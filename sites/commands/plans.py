"""`fedseg-site plan show | approve | refuse`: the hospital reads a plan, and decides."""

from __future__ import annotations

import getpass
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedseg.errors import DataError
from fedseg.shell import progress_bar
from sites.audit import require_words
from sites.commands.options import HERE, SiteOption, StudyArgument, open_site
from sites.folder import SiteFolder
from sites.rights import as_owner_of

if TYPE_CHECKING:
    from fedseg.imaging.cases import Cohort
    from fedseg.plan import StudyPlan
    from sites.approval import CohortRecord

app = typer.Typer(
    no_args_is_help=True, help="Read a study's plan in plain language, approve or refuse it."
)
APPROVE_EPILOG = """
Examples:

  fedseg-site plan approve lung --data /data/lung --by "Dr. Weber, data protection"

  fedseg-site plan approve lung     (again, for a new list of sites: same data)
"""


@app.command(epilog="Example:  fedseg-site plan show lung --site /var/lib/fedseg")
def show(
    study: StudyArgument,
    site: SiteOption = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what will be trained on which data, what leaves, and who could learn what."""
    from sites.decision import situation_of
    from sites.explain import explain

    sections = explain(situation_of(open_site(site), study))
    if as_json:
        typer.echo(json.dumps({part.title: list(part.lines) for part in sections}, indent=2))
        return
    console = Console()
    for part in sections:
        console.print(f"\n{escape(part.title)}", style="bold")
        for line in part.lines:
            bullet = "    " if line.startswith("  ") else "  - "
            console.print(f"{bullet}{line.strip()}", markup=False, highlight=False, soft_wrap=True)


@app.command(epilog=APPROVE_EPILOG)
def approve(
    study: StudyArgument,
    data: Annotated[
        Path | None,
        typer.Option(help="The data folder, as `fedseg-site check` reads it; else as approved."),
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="CSV in the folder to use instead of sites.csv.")
    ] = None,
    row: Annotated[
        str | None, typer.Option(help="What the data call this hospital, if not as enrolled.")
    ] = None,
    any_later_sites: Annotated[
        bool, typer.Option("--any-later-sites", help="Sites added later need no approval.")
    ] = False,
    by: Annotated[str | None, typer.Option(help="Who approves; else the login name.")] = None,
    site: SiteOption = HERE,
) -> None:
    """Check the data, freeze which cases are used, and allow the study to train on them."""
    from sites import decision
    from sites.enrolment import pinned_bundle
    from sites.keyring import open_signing_key

    folder = open_site(site)
    who = require_words(by if by is not None else _login(), "--by")
    plan = pinned_bundle(folder, study).plan
    key = open_signing_key(folder)
    decision.require_permitted(folder, plan, key)
    record, cohort = _chosen(folder, plan, data, table, row)
    added = decision.situation_of(folder, study).added
    approval = decision.approve(
        folder, study, record, key, any_later_sites=any_later_sites, by=who, cohort=cohort
    )
    if plan.private is not None:
        typer.echo(
            "the patients are in this hospital's ledger; what they may be charged and what is "
            "left: fedseg-site ledger budget"
        )
    typer.echo(f"approved the plan {approval.plan[:16]}... of {study}, as {who}")
    if added:
        typer.echo(f"with the new sites {', '.join(added)}")
    typer.echo("`fedseg-site plan refuse` takes this back at any time")


@app.command(epilog='Example:  fedseg-site plan refuse lung --reason "no consent for reuse"')
def refuse(
    study: StudyArgument,
    reason: Annotated[str, typer.Option(help="Why; no patient's name. It stays in the audit.")],
    site: SiteOption = HERE,
) -> None:
    """Say no to a plan, or take an approval back: nothing is trained from now on."""
    from sites import decision
    from sites.keyring import open_signing_key

    folder = open_site(site)
    require_words(reason, "--reason")
    withdrawn = decision.refuse(folder, study, reason, open_signing_key(folder))
    typer.echo(f"{'took back the approval of' if withdrawn else 'refused'} {study}")


def _chosen(
    folder: SiteFolder, plan: StudyPlan, data: Path | None, table: str | None, row: str | None
) -> tuple[CohortRecord, Cohort | None]:
    """The data to approve: looked at now, or as they were frozen before."""
    from sites.approval import frozen_record

    if data is None:
        record = frozen_record(folder, plan.study, plan.digest)
        if record is None:
            raise DataError("which data may be used? say --data DIR; nothing is frozen yet")
        if table is not None or row is not None:
            raise DataError("--table and --row belong to --data: say which folder")
        typer.echo(f"data as approved before: {record.patients.get('train', 0)} training patients")
        return record, None
    with as_owner_of(folder.trainer):
        return _looked_at(folder, plan, data, table, row)


def _looked_at(
    folder: SiteFolder, plan: StudyPlan, data: Path, table: str | None, row: str | None
) -> tuple[CohortRecord, Cohort]:
    """Inspect the data with the trainer's rights, and say what is used of them."""
    from sites.cohort import choose_cohort

    chosen = choose_cohort(
        folder.record.name,
        plan,
        data,
        table=table,
        row=row,
        progress=lambda cases: progress_bar("checking", cases),
    )
    record = chosen.record
    used = ", ".join(f"{count} {split}" for split, count in record.patients.items() if count)
    typer.echo(f"{sum(record.patients.values())} patients are used ({used})")
    warnings = sum(finding.severity == "warning" for finding in chosen.inspection.findings)
    typer.echo(
        f"{chosen.left_out_patients} patients are left out whole; {record.left_out} images cannot "
        f"be used, {record.unlisted} could not be listed, {warnings} warnings"
    )
    if record.left_out or record.unlisted or warnings:
        named = f" --table {table}" if table else ""
        plan_file = folder.plan(plan.study)
        typer.echo(f"each with its remedy: fedseg-site check {data}{named} --plan {plan_file}")
    return record, chosen.cohort


def _login() -> str:
    """Who is at the keyboard, as far as the system knows."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
