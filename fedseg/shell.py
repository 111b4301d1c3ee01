"""The shell around every command line of fedseg: what a user can mend is one red message.

`fedseg`, `fedseg-site` and `fedseg-coordinator` all run in it. Errors of our own code keep their
traceback. Nothing heavy is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fedseg.errors import FedsegError, MissingExtraError

OWN = frozenset({"fedseg", "sites", "coordinator"})
INTERRUPTED = 130


def run(app: typer.Typer, *, extra: str, stopped: str = "stopped") -> None:
    """Run a command line; it ends with status 1 and one message where the user can mend the cause.

    Args:
        app: the commands.
        extra: what to install where a package is missing.
        stopped: what to say to Ctrl-C; the status is 130.
    """
    try:
        app()
    except FedsegError as error:
        _end(str(error), "red", 1)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if not module or module in OWN:
            raise
        _end(str(MissingExtraError(extra, module)), "red", 1)
    except KeyboardInterrupt:
        _end(stopped, "yellow", INTERRUPTED)


def _end(message: str, style: str, status: int) -> NoReturn:
    """One message on the error stream, and out."""
    console = Console(stderr=True)
    console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the error stream, so that JSON on the output stays clean."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda _name: bar.advance(task)
