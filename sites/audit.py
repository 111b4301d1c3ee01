"""The site's audit: what was enrolled, approved, asked, answered and refused, and that it stands.

`fedseg-site audit show` reads it, `audit verify` proves that nothing was edited, removed or put in
another order, and `backup restored` records the one thing the log cannot know by itself: that it
was put back to an earlier state.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedseg.chain import Chain, Entry, Fact, read_chain, verify_chain
from fedseg.errors import DataError
from fedseg.security.keys import SigningKey
from sites.folder import SiteFolder, as_owner_of
from sites.keyring import open_signing_key
from sites.options import HERE, SiteOption, open_site

audit = typer.Typer(no_args_is_help=True, help="What was asked, approved, answered and refused.")
backup = typer.Typer(no_args_is_help=True, help="Declare that a backup was put back.")


def utc_now() -> str:
    """ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def record(
    folder: SiteFolder,
    key: SigningKey,
    event: str,
    now: Callable[[], str] = utc_now,
    **facts: Fact,
) -> Entry:
    """Append one entry to a site's audit; it is on disk when this returns.

    Raises:
        TrustError: the audit was changed: nothing is appended, and nothing should go on.
        StorageError: it cannot be written.
    """
    with as_owner_of(folder.trainer):
        return Chain(folder.audit, key, now).append(event, **facts)


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


def require_words(text: str, option: str) -> str:
    """Words for the audit: some, and not too many.

    Raises:
        DataError: empty, too long, or not printable.
    """
    if not text.strip() or len(text) > 500 or not text.isprintable():
        raise DataError(f"{option} needs 1 to 500 printable characters on one line")
    return text


def _short(value: Fact) -> str:
    """A fact in a table: digests by their beginning."""
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text
