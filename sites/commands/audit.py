"""`fedseg-site audit show | verify` and `backup restored`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedseg.chain import Fact, read_chain, verify_chain
from sites.audit import record, require_words
from sites.commands.options import HERE, SiteOption, open_site
from sites.keyring import open_signing_key

audit = typer.Typer(no_args_is_help=True, help="What was asked, approved, answered and refused.")
backup = typer.Typer(no_args_is_help=True, help="Declare that a backup was put back.")


@audit.command(epilog="Example:  fedseg-site audit show --study lung --last 20 --site SITEDIR")
def show(
    site: SiteOption = HERE,
    study: Annotated[str | None, typer.Option(help="Only entries of this study.")] = None,
    last: Annotated[int, typer.Option(min=1, help="How many, the newest.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one entry a line.")] = False,
) -> None:
    """Show the newest entries; `audit verify` says whether they are what was written."""
    folder = open_site(site)
    entries = [e for e in read_chain(folder.audit) if study in (None, e.facts.get("study"))]
    if as_json:
        for entry in entries[-last:]:
            typer.echo(json.dumps(entry.model_dump(mode="json"), sort_keys=True))
        return
    table = Table("no.", "when (UTC)", "event", "facts")
    for entry in entries[-last:]:
        facts = ", ".join(f"{name}: {_short(value)}" for name, value in entry.facts.items())
        table.add_row(str(entry.n), entry.at, entry.event, escape(facts))
    console = Console()
    console.print(table)
    if len(entries) > last:
        console.print(f"{len(entries) - last} older entries: --last {len(entries)}")


@audit.command(epilog="Example:  fedseg-site audit verify --site SITEDIR")
def verify(site: SiteOption = HERE) -> None:
    """Prove that no entry was edited, removed or put in another order; else exit status 1."""
    folder = open_site(site)
    entries = verify_chain(folder.audit, open_signing_key(folder).public)
    newest = f", the newest of {entries[-1].at}" if entries else ""
    typer.echo(f"the audit stands: {len(entries)} entries{newest}")
    if entries:
        typer.echo(
            f"to show later that none is missing, note: entry {entries[-1].n}, {entries[-1].hash}"
        )


@backup.command(epilog='Example:  fedseg-site backup restored --note "disk replaced"')
def restored(
    note: Annotated[str, typer.Option(help="Why; no patient's name. Goes into the audit.")],
    site: SiteOption = HERE,
) -> None:
    """Record that this folder was put back from a backup: the audit and what was answered is older.

    Do it before the daemon starts again, and tell the consortium: a task of a round that was
    answered after the backup may be worked on again.
    """
    folder = open_site(site)
    require_words(note, "--note")
    key = open_signing_key(folder)
    before = verify_chain(folder.audit, key.public)
    entry = record(folder, key, "restored", reason=note, entries=len(before))
    typer.echo(f"entry {entry.n}: restored, with {len(before)} entries before it")
    if folder.ledger.exists():
        typer.echo(
            "The privacy ledger went back as well, and nobody here knows what it has forgotten. "
            'Before the daemon starts: fedseg-site ledger restore --whole-folder --reason "..."'
        )


def _short(value: Fact) -> str:
    """A fact in a table: digests by their beginning."""
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text
