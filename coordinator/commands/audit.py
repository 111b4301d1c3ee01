"""`fedseg-coordinator audit show | verify` and `backup restored`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from coordinator.commands.study import StudyPath, unlocked

audit = typer.Typer(no_args_is_help=True, help="What was done in the study, in an unbroken chain.")
backup = typer.Typer(no_args_is_help=True, help="Declare that a backup was put back.")


@audit.command(epilog="Example:  fedseg-coordinator audit show --study /srv/liver --last 20")
def show(
    study: StudyPath = Path(),
    last: Annotated[int | None, typer.Option(min=1, help="Only this many entries.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print the entries, oldest first; use `verify` to see whether they hold."""
    from coordinator.folder import open_study
    from fedseg.chain import read_chain

    entries = read_chain(open_study(study).audit)
    for entry in entries[-last:] if last else entries:
        facts = "  ".join(f"{name}={value}" for name, value in entry.facts.items())
        line = f"{entry.n:>6}  {entry.at}  {entry.event:<16} {facts}".rstrip()
        typer.echo(entry.model_dump_json() if json else line)


@audit.command(epilog="Example:  fedseg-coordinator audit verify --study /srv/liver")
def verify(study: StudyPath = Path()) -> None:
    """Check that no entry was edited, removed or put elsewhere; exit status 1 names the first."""
    from coordinator.folder import open_study
    from coordinator.office.key import public_key
    from fedseg.chain import verify_chain

    folder = open_study(study)
    entries = verify_chain(folder.audit, public_key(folder))
    last = f", the last of {entries[-1].at}" if entries else ""
    typer.echo(f"the audit holds: {len(entries)} entries{last}")
    if entries:
        typer.echo(
            f"to show later that none is missing, note: entry {entries[-1].n}, {entries[-1].hash}"
        )


@backup.command(
    epilog='Example:  fedseg-coordinator backup restored --reason "disk failed" --study /srv/liver'
)
def restored(
    reason: Annotated[str, typer.Option(help="What was put back, and why.")],
    study: StudyPath = Path(),
    above: Annotated[
        int,
        typer.Option(
            min=0, help="Highest version of the roll that any site reports; see its status."
        ),
    ] = 0,
) -> None:
    """Declare that a backup was put back, so that sites accept the roll again.

    Look at `fedseg-coordinator sites` first: who was revoked after the backup is back in it.
    """
    from coordinator.folder import open_study
    from coordinator.office.enrolment import declare_restored

    folder = open_study(study)
    version = declare_restored(folder, reason, above, unlocked(folder)[0], datetime.now(UTC))
    typer.echo(f"recorded; the roll now has version {version}")
