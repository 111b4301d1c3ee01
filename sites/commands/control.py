"""The daemon's commands: run both halves of a site, or one; look at it, pause it, stop it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedseg.errors import DataError
from fedseg.sole import holder
from sites.commands.options import HERE, SiteOption, StudyArgument, open_site
from sites.folder import SiteFolder
from sites.notes import write_note
from sites.rights import SHARED_FOLDER, make_folder

ListenOption = Annotated[
    str | None,
    typer.Option(
        "--listen",
        metavar="PLACE",
        help="unix:PATH or 127.0.0.1:PORT (with a token in run/); default: run/trainer.sock.",
    ),
]
GroupOption = Annotated[
    str | None,
    typer.Option(help="A group that may ask the trainer too: the relay's, where users differ."),
]
DeviceOption = Annotated[str, typer.Option(help="Where torch computes: cpu, cuda, cuda:1.")]
STOP_S = 60.0
WATCH_S = 1.0

RUN_EPILOG = """
Examples:

  fedseg-site run /srv/fedseg/hospital_a

  FEDSEG_PASSPHRASE_FILE=/run/secrets/fedseg fedseg-site run /srv/fedseg/hospital_a
"""


def run(
    folder: Annotated[
        Path, typer.Argument(metavar="SITEDIR", envvar="FEDSEG_SITE", help="This site's folder.")
    ],
    listen: ListenOption = None,
    socket_group: GroupOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Run this site: its trainer, and a relay for each study that is joined and approved.

    Both are started again when they end, and again while Flower holds the session before. Ctrl-C or
    SIGTERM ends all of it; what was worked on is worked on again afterwards. For hospitals that
    keep the two halves apart, `trainer` and `relay` run one of them.
    """
    from fedseg.logs import configure
    from sites.daemon import run_daemon

    site = open_site(folder)
    place = _place(site, listen, socket_group)
    configure(sys.stderr)
    run_daemon(site, place, device)


def trainer(
    site: SiteOption = HERE,
    listen: ListenOption = None,
    socket_group: GroupOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Run the half that has data and keys, alone: for systemd and containers.

    It listens on a Unix socket or on a loopback port, and connects to nothing.
    """
    from fedseg.logs import configure
    from sites.listening import run_trainer

    folder = open_site(site)
    configure(sys.stderr)
    run_trainer(folder, _place(folder, listen, socket_group), device)


def relay(study: StudyArgument, site: SiteOption = HERE) -> None:
    """Run the half that has the network, alone, for one study: for systemd and containers.

    It becomes Flower's SuperNode: nothing of fedseg's surrounds it, and it needs relay/ and the
    trainer's socket only. Have it started again when it ends: after a kill Flower refuses it for
    up to 60 s.
    """
    from sites.relay import relay_of

    folder = SiteFolder(site)
    started = relay_of(folder, study)
    make_folder(folder.flower(study))
    os.execve(started.command[0], started.command, dict(started.environment))


def status(
    site: SiteOption = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second.")] = False,
) -> None:
    """Show what this site is doing. Exit status 0 only while its trainer answers."""
    from sites.standing import standing

    folder = open_site(site)
    if watch and not as_json:
        with Live(console=Console(), refresh_per_second=2) as live:
            while True:
                live.update(_page(standing(folder)))
                time.sleep(WATCH_S)
    found = standing(folder)
    if as_json:
        typer.echo(json.dumps(found, indent=1, sort_keys=True))
    else:
        Console().print(_page(found))
    raise typer.Exit(0 if found["trainer"]["answers"] else 1)


def pause(site: SiteOption = HERE) -> None:
    """Take no more tasks until `resume`; the one that is worked on is finished and kept."""
    folder = open_site(site)
    make_folder(folder.run, SHARED_FOLDER)
    write_note(folder.paused, b"paused\n")
    typer.echo("paused: no task is taken until `fedseg-site resume`")


def resume(site: SiteOption = HERE) -> None:
    """Take tasks again."""
    folder = open_site(site)
    if not folder.paused.exists():
        typer.echo("this site is not paused")
        return
    folder.paused.unlink()
    typer.echo("tasks are taken again")


def stop(site: SiteOption = HERE) -> None:
    """Stop the daemon and wait until it has ended; a task that is worked on is lost, not its data.

    The task is sent again when the site is back.
    """
    folder = open_site(site)
    pid = holder(folder.pid)
    if pid is None:
        typer.echo("no daemon runs in this folder")
        return
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError:
        raise DataError(
            f"the daemon (process {pid}) belongs to another user: stop it as that user or as root"
        ) from None
    except ProcessLookupError:
        pass
    until = time.monotonic() + STOP_S
    while holder(folder.pid) is not None:
        if time.monotonic() > until:
            raise DataError(f"the daemon (process {pid}) has not ended within {STOP_S:.0f} s")
        time.sleep(0.1)
    typer.echo("stopped")


def _place(folder: SiteFolder, listen: str | None, group: str | None) -> Any:
    """Where the trainer is to listen."""
    from sites.listening import Place

    return Place(listen or f"unix:{folder.socket}", group)


def _page(found: dict[str, Any]) -> Group:
    """The status as a person reads it."""
    table = Table("study", "plan")
    table.add_column("relay", min_width=24, ratio=1)
    for heading in ("restarts", "last task"):
        table.add_column(heading)
    for name, study in found["studies"].items():
        last = study["last"]
        done = "-" if last is None else f"round {last['round']}, {last['stage']}"
        table.add_row(
            name,
            escape(study["plan"]),
            escape(study["relay"]),
            str(study["restarts"]),
            f"{done}; final model here" if study["model"] else done,
        )
    return Group(Text(_headline(found)), *([table] if found["studies"] else []))


def _headline(found: dict[str, Any]) -> str:
    """Site, daemon and trainer in a few lines."""
    daemon, trainer = found["daemon"], found["trainer"]
    doing = trainer["doing"]
    lines = [
        f"site {found['site']}",
        "daemon: not running" if daemon is None else f"daemon: runs since {daemon['started'][:19]}",
    ]
    if not trainer["answers"]:
        lines.append(f"trainer: does not answer ({trainer['state']})")
    elif doing is None:
        lines.append("trainer: ready, waits for tasks")
    else:
        seconds = datetime.now(UTC) - datetime.fromisoformat(doing["since"])
        lines.append(
            f"trainer: works on {doing['study']}, round {doing['round']}, {doing['stage']}, "
            f"for {seconds.total_seconds():.0f} s"
        )
    closed = found["closed"] or ("paused" if found["paused"] else None)
    if closed:
        lines.append(f"no task is taken: {closed}")
    if not found["studies"]:
        lines.append("no study was joined: `fedseg-site join BUNDLE`")
    return "\n".join(lines)
