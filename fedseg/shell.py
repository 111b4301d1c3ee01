"""The shell around every command line of fedseg: what a user can mend is one red message.

`fedseg`, `fedseg-site` and `fedseg-coordinator` all run in it. Errors of our own code keep their
traceback. Nothing heavy is imported here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fedseg.errors import DataError, FedsegError, MissingExtraError

OWN = frozenset({"fedseg", "sites", "coordinator"})
INTERRUPTED = 130
PASSPHRASE_FILE = "FEDSEG_PASSPHRASE_FILE"
MAX_PASSPHRASE_BYTES = 4096


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
    except PermissionError as error:
        _end(_forbidden(error), "red", 1)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if not module or module in OWN:
            raise
        _end(str(MissingExtraError(extra, module)), "red", 1)
    except KeyboardInterrupt:
        _end(stopped, "yellow", INTERRUPTED)


def passphrase(ask: str | None = None, *, new: bool = False) -> bytes | None:
    """The passphrase of encrypted keys: from the file that FEDSEG_PASSPHRASE_FILE names, or asked.

    Args:
        ask: what to ask at a terminal where no file is named; None never asks.
        new: ask twice, for a key that is being made.

    Returns:
        The passphrase, or None where there is neither a file nor somebody to ask.

    Raises:
        DataError: the file cannot be read, is empty, or is no passphrase.
    """
    named = os.environ.get(PASSPHRASE_FILE)
    if named:
        return _passphrase_in(Path(named))
    if ask is None or not sys.stdin.isatty():
        return None
    answer: str = typer.prompt(ask, hide_input=True, confirmation_prompt=new, err=True)
    return answer.encode()


def _passphrase_in(path: Path) -> bytes:
    """The first line of a file, without its end."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PASSPHRASE_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"cannot read the file that {PASSPHRASE_FILE} names: {error.strerror}"
        ) from None
    line = data.rstrip(b"\r\n")
    if not line or len(data) > MAX_PASSPHRASE_BYTES or b"\n" in line:
        raise DataError(f"the file that {PASSPHRASE_FILE} names must hold one line: the passphrase")
    return line


def _forbidden(error: PermissionError) -> str:
    """What this user may not touch, by its last name alone."""
    what = Path(os.fsdecode(error.filename)).name if error.filename else "something it needs"
    return f"this user has no right to {what}: run the command as the user who has, or as root"


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
