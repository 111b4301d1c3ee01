"""`fedseg-site`: what a hospital runs. This module only mounts the commands of others."""

from __future__ import annotations

import typer

from fedseg.shell import run
from sites import check

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
    run(app, extra="site")
