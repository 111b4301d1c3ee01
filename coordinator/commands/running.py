"""`fedseg-coordinator run`, `status`, `pause`, `resume`, `stop`, `logs`: a study that runs."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.commands.study import StudyPath

if TYPE_CHECKING:
    from rich.console import RenderableType

    from coordinator.folder import StudyFolder

RUN_EPILOG = "Example:  fedseg-coordinator run /srv/liver"
PROXY_EPILOG = "Example:  fedseg-coordinator proxy /srv/liver"
STATUS_EPILOG = "Example:  fedseg-coordinator status --watch --study /srv/liver"
PAUSE_EPILOG = "Example:  fedseg-coordinator pause --study /srv/liver"
RESUME_EPILOG = "Example:  fedseg-coordinator resume --study /srv/liver"
STOP_EPILOG = "Example:  fedseg-coordinator stop --study /srv/liver"
LOGS_EPILOG = "Example:  fedseg-coordinator logs --follow --of study --study /srv/liver"
REFRESH_S = 1.0

StudyDir = Annotated[Path, typer.Argument(metavar="STUDYDIR", help="The study's folder.")]


def run(
    study: StudyDir,
    without_proxy: Annotated[
        bool,
        typer.Option(
            "--without-proxy",
            help="Start no nginx: `fedseg-coordinator proxy` runs as a service of its own.",
        ),
    ] = False,
) -> None:
    """Run a study in the foreground until it is stopped; started again, it goes on where it was.

    Supervises Flower's SuperLink, the proxy, and the study's run. Ctrl-C or SIGTERM end all of it.
    """
    from coordinator.folder import open_study
    from coordinator.running.daemon import run_daemon

    folder = open_study(study)
    _log_to(folder)
    run_daemon(folder, with_proxy=not without_proxy)


def proxy(study: StudyDir) -> None:
    """Become the proxy alone: write its configuration, check it, and run nginx in this process."""
    import os

    from coordinator.folder import open_study
    from coordinator.running.proxy import find_nginx, proxy_command, proxy_environment, write_proxy

    folder, nginx = open_study(study), find_nginx()
    write_proxy(folder, folder.settings(), nginx)
    command = proxy_command(folder, nginx)
    os.execve(command[0], command, proxy_environment())


def status(
    study: StudyPath = Path(),
    watch: Annotated[bool, typer.Option("--watch", help="Stay and keep it up to date.")] = False,
    json: Annotated[bool, typer.Option("--json", help="All of it, as one JSON object.")] = False,
) -> None:
    """Say where the study stands: rounds, sites on line, Dice, time left, and what ends soon."""
    from rich.console import Console
    from rich.live import Live

    from coordinator.folder import open_study
    from coordinator.running.control import look

    folder = open_study(study)
    if json:
        typer.echo(look(folder, datetime.now(UTC)).model_dump_json(indent=2))
    elif watch:
        with Live(_shown(folder), console=Console(), screen=True, auto_refresh=False) as live:
            while True:
                live.update(_shown(folder), refresh=True)
                time.sleep(REFRESH_S)
    else:
        Console().print(_shown(folder))


def pause(study: StudyPath = Path()) -> None:
    """Begin no new stage; the open one is finished first. It lasts over restarts."""
    from coordinator.folder import open_study
    from coordinator.running.control import pause as ask

    done = ask(open_study(study))
    typer.echo("the study pauses after the open stage" if done else "the study is paused already")


def resume(study: StudyPath = Path()) -> None:
    """Go on after a pause."""
    from coordinator.folder import open_study
    from coordinator.running.control import resume as ask

    typer.echo("the study goes on" if ask(open_study(study)) else "the study was not paused")


def stop(
    study: StudyPath = Path(),
    within: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="How long to wait for it.")
    ] = 60.0,
) -> None:
    """End the daemon and all that it started; `run` goes on from the last closed stage."""
    from coordinator.folder import open_study
    from coordinator.running.control import stop as ask

    ask(open_study(study), within_s=within)
    typer.echo("the coordinator has stopped")


def logs(
    study: StudyPath = Path(),
    of: Annotated[
        str, typer.Option(help="Whose: superlink, proxy, study or daemon.", metavar="NAME")
    ] = "study",
    last: Annotated[int, typer.Option(min=0, help="So many lines of what was said before.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay for what comes.")] = False,
) -> None:
    """Print what a part of the coordinator said."""
    from typing import get_args

    from coordinator.folder import open_study
    from coordinator.running.control import Log, read_log
    from fedseg.errors import DataError

    folder = open_study(study)
    if of not in get_args(Log):
        raise DataError(f"there is no log of {of}: name one of {', '.join(get_args(Log))}")
    for line in read_log(folder.log(of), last, follow=follow):
        typer.echo(line, nl=False)


def _log_to(folder: StudyFolder) -> None:
    """The daemon speaks to its terminal or journal, and to its own log."""
    import sys

    from fedseg.logs import configure

    folder.logs.mkdir(mode=0o700, exist_ok=True)
    configure(sys.stderr, also=folder.log("daemon"))


def _shown(folder: StudyFolder) -> RenderableType:
    """The status as a page for a terminal."""
    from coordinator.commands.status_page import page
    from coordinator.running.control import look

    return page(look(folder, datetime.now(UTC)), datetime.now(UTC))
