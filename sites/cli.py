"""`fedseg-site`: what a hospital runs. This module only mounts the commands of others."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from fedseg.errors import FedsegError, MissingExtraError
from sites import check

OWN = frozenset({"fedseg", "sites", "coordinator"})

app = typer.Typer(
    name="fedseg-site",
    help="Check a hospital's data before a study, and look after what fedseg keeps of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("check", epilog=check.CHECK_EPILOG)(check.check)
app.add_typer(check.cache, name="cache")


@app.callback()
def fedseg_site() -> None:
    """Check a hospital's data before a study, and look after what fedseg keeps of them."""


def main() -> None:
    """Run the command line; what the user can mend is said in red, with exit status 1."""
    try:
        app()
    except FedsegError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if not module or module in OWN:
            raise
        _fail(MissingExtraError("site", module))


def _fail(error: FedsegError) -> None:
    """One red line on the error stream."""
    console = Console(stderr=True)
    console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)
