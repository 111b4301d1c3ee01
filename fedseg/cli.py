"""`fedseg`: what a researcher runs. This module only mounts the commands of others."""

from __future__ import annotations

import typer

from fedseg import __version__
from fedseg.commands import audit, demo, federation, models, phantoms, plans, pretrain, simulations
from fedseg.shell import run

app = typer.Typer(
    name="fedseg",
    help="Federated learning of medical image segmentation: plan a study, simulate it, measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(plans.app, name="plan")
app.add_typer(audit.app, name="audit")
app.command("demo", epilog=demo.EPILOG)(demo.run)
app.command("federation", epilog=federation.EPILOG)(federation.run)
app.command("phantoms", epilog=phantoms.EPILOG)(phantoms.write)
app.command("pretrain", epilog=pretrain.EPILOG)(pretrain.run)
app.command("simulate", epilog=simulations.EPILOG)(simulations.run)
app.command("evaluate", epilog=models.EVALUATE_EPILOG)(models.evaluate)
app.command("predict", epilog=models.PREDICT_EPILOG)(models.predict)


def _version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(f"fedseg {__version__}")
        raise typer.Exit


@app.callback()
def fedseg(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Federated learning of medical image segmentation: plan a study, simulate it, measure it."""


def main() -> None:
    """Run the command line; what the user can mend is said in red, with exit status 1."""
    run(app, extra="simulation", stopped="stopped; a simulation goes on with `--resume`")
