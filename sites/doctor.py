"""`fedseg-site doctor`: looks at everything that a study needs at a hospital, and says what to do.

The two halves of a site may be two users or two containers, and neither can look into the other's
folders: `--half` leaves out what belongs to the other. Nothing is changed, no patient is named, and
no connection is made but to the coordinators of the studies that were joined.
"""

from __future__ import annotations

import json as json_text
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedseg.errors import FedsegError, MissingExtraError
from sites.checkup import house, ledger, machine, network, proxies, studies
from sites.checkup.verdict import Condition, Verdict, fail
from sites.commands.options import HERE, SiteOption, open_site
from sites.folder import SiteFolder
from sites.relay import relay_of

DOCTOR_EPILOG = """
Examples:

  fedseg-site doctor --site /var/lib/fedseg

  fedseg-site doctor --half relay --json > ticket.json
"""
_MARKS: dict[Condition, str] = {
    "ok": "[green]ok[/]",
    "warning": "[yellow]look[/]",
    "fail": "[red]FAIL[/]",
}
Found = Verdict | list[Verdict]
Check = tuple[str, Callable[[], Found]]


class Half(StrEnum):
    """Which half of a site is looked at."""

    BOTH = "both"
    RELAY = "relay"
    TRAINER = "trainer"


def doctor(
    half: Annotated[
        Half, typer.Option(help="Only what this half of the site can see and needs.")
    ] = Half.BOTH,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    site: SiteOption = HERE,
) -> None:
    """Check what a study needs here, in plain language; each line that fails says what to do.

    Reads all data that were approved, which takes as long as reading them takes. Exit status 1
    where something fails; warnings alone leave it at 0.
    """
    folder = open_site(site)
    found = list(examine(folder, half, now=lambda: datetime.now(UTC)))
    if json:
        typer.echo(json_text.dumps([asdict(verdict) for verdict in found], indent=1))
    else:
        _print(found)
    raise typer.Exit(1 if any(verdict.condition == "fail" for verdict in found) else 0)


def examine(folder: SiteFolder, half: Half, now: Callable[[], datetime]) -> Iterator[Verdict]:
    """Every check of one half, or of both, in the order in which they explain one another."""
    for subject, check in _checks(folder, half, now):
        yield from _guarded(subject, check)


def _checks(folder: SiteFolder, half: Half, now: Callable[[], datetime]) -> Iterator[Check]:
    """What there is to look at."""
    extra = "" if half is Half.RELAY else "site"
    yield "Python and packages", lambda: machine.python_and_packages(extra)
    yield "Owners and modes", lambda: house.owners_and_modes(folder)
    if half is not Half.RELAY:
        yield from _of_the_trainer(folder, now)
    yield "Trainer's socket", lambda: house.door(folder)
    if half is not Half.TRAINER:
        yield from _of_the_relay(folder, now)
    yield "Daemon", lambda: house.daemon(folder)


def _of_the_trainer(folder: SiteFolder, now: Callable[[], datetime]) -> Iterator[Check]:
    """Keys, rules, data, and what they are worked on with."""
    yield "GPU", machine.graphics
    yield "Identity keys", lambda: house.trainer_keys(folder)
    yield "Policy", lambda: house.policy(folder)
    yield "Privacy ledger", lambda: ledger.ledger(folder)
    sizes: dict[str, int] = {}
    for study in folder.joined:
        yield f"Flower ({study})", partial(studies.flower, folder, study)
        yield f"Approval ({study})", partial(studies.permission, folder, study)
        yield f"Ledger ({study})", partial(ledger.register, folder, study)
        yield f"List of sites ({study})", partial(studies.roll, folder, study, now)
        yield f"Data ({study})", partial(studies.data, folder, study, sizes)
    yield "Disk", lambda: machine.disk(folder, sizes)


def _of_the_relay(folder: SiteFolder, now: Callable[[], datetime]) -> Iterator[Check]:
    """The node key and the way to each coordinator."""
    yield "Node key", lambda: house.node_key(folder)
    for study in folder.linked:
        yield f"Network ({study})", partial(_network, folder, study, now)


def _network(folder: SiteFolder, study: str, now: Callable[[], datetime]) -> list[Verdict]:
    """The way to one coordinator, as the relay goes it."""
    environment = relay_of(folder, study, os.environ).environment
    peer = network.Peer.of(study, folder.link_of(study).address, folder.ca(study), environment)
    way = proxies.settings(study, peer.host, peer.proxy)
    named = network.resolve(peer)
    if "fail" in {way.condition, named.condition}:
        return [way, named]
    return [way, named, *network.reach(peer, now)]


def _guarded(subject: str, check: Callable[[], Found]) -> list[Verdict]:
    """A check's verdicts; one that could not look at all says why."""
    try:
        found = check()
    except MissingExtraError as error:
        return [fail(subject, "could not be looked at", str(error))]
    except FedsegError as error:
        says, _, remedy = str(error).rpartition(": ")
        return [fail(subject, says or remedy, remedy if says else "see docs/deploy.md")]
    except PermissionError:
        return [
            fail(
                subject,
                "this user may not look at it",
                "run the doctor as root, or once as each half's user with --half",
            )
        ]
    except OSError as error:
        return [fail(subject, f"could not be looked at: {error.strerror}", "mend that first")]
    return found if isinstance(found, list) else [found]


def _print(found: list[Verdict]) -> None:
    """A table, what to do beneath what was found."""
    table = Table("", "what", "found", box=None, pad_edge=False)
    for verdict in found:
        says = escape(verdict.says)
        if verdict.remedy:
            says += f"\n[bold]do:[/] {escape(verdict.remedy)}"
        table.add_row(_MARKS[verdict.condition], escape(verdict.subject), says)
    console = Console()
    console.print(table)
    fails = sum(verdict.condition == "fail" for verdict in found)
    looks = sum(verdict.condition == "warning" for verdict in found)
    console.print(f"{len(found)} checks: {fails} failed, {looks} to look at")
