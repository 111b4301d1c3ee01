"""`fedseg-coordinator`: what the consortium runs; for now, looking after a study's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedseg.aggregation.checkpoint import load_state
from fedseg.plan import load_plan
from fedseg.shell import run

app = typer.Typer(
    name="fedseg-coordinator",
    help="Look after a study.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def coordinator() -> None:
    """Look after a study."""


@app.command(epilog="Example:  fedseg-coordinator status OUT/plan.json OUT/federated/checkpoint...")
def status(
    plan: Annotated[Path, typer.Argument(help="The built plan: OUT/plan.json.")],
    checkpoint: Annotated[Path, typer.Argument(help="The study's checkpoint.safetensors.")],
) -> None:
    """Say where a study stands, from its checkpoint."""
    study = load_plan(plan)
    state = load_state(checkpoint, study)
    done = state.server.steps
    where = "finished" if state.position is None else f"next: {state.position.stage}"
    typer.echo(f"{study.study}: {done} of {study.aggregation.rounds} rounds closed, {where}")
    for record in state.history:
        for failure in record.failures:
            typer.echo(f"  round {record.round} {record.stage}: {failure.site}: {failure.reason}")


def main() -> None:
    """Run the command line; what the user can mend is said in red, with exit status 1."""
    run(app, extra="coordinator")
