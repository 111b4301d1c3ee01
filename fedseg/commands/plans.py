"""`fedseg plan`: write, check, show and build a study plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedseg import planfile
from fedseg.plan import StudyPlan, load_plan

app = typer.Typer(
    help="Write, check, show and build a study plan.",
    no_args_is_help=True,
)
PlanPath = Annotated[Path, typer.Argument(help="The plan file, for example study.yaml.")]


@app.command(
    epilog="Examples:  fedseg plan new study.yaml    fedseg plan new lung.yaml --example ct-2d"
)
def new(
    path: PlanPath,
    example: Annotated[str, typer.Option(help="mr-3d (every field) or ct-2d.")] = "mr-3d",
) -> None:
    """Write a commented example plan to start from."""
    if example not in planfile.EXAMPLES:
        raise typer.BadParameter(f"choose one of {', '.join(planfile.EXAMPLES)}")
    planfile.write_example(path, planfile.example(example))
    typer.echo(f"wrote {path}; edit it, then: fedseg plan check {path}")


@app.command(epilog="Example:  fedseg plan check study.yaml")
def check(path: PlanPath) -> None:
    """Check every field and how fields fit together; exit status 1 names what is wrong."""
    plan = load_plan(path)
    built = "built" if plan.initial else "not built yet: fedseg plan build"
    typer.echo(f"{path} holds: study {plan.study}, digest {plan.digest} ({built})")


@app.command(epilog="Example:  fedseg plan show study.yaml --json")
def show(
    path: PlanPath,
    json: Annotated[bool, typer.Option("--json", help="The canonical bytes.")] = False,
) -> None:
    """Show what a plan asks for, with every default filled in."""
    plan = load_plan(path)
    if json:
        typer.echo(plan.canonical_bytes.decode())
        return
    Console().print(_table(plan))


@app.command(
    epilog="Examples:  fedseg plan build study.yaml    "
    "fedseg plan build study.yaml --from model.safetensors"
)
def build(
    path: PlanPath,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Start from this model, as `fedseg pretrain` writes it."),
    ] = None,
) -> None:
    """Make the initial model, and record its digest and tensors in the plan."""
    plan = planfile.build(path, start)
    count = sum(spec.nbytes for spec in plan.built.tensors) // 4
    typer.echo(
        f"wrote {planfile.initial_path(path)} ({count / 1e6:.2f} M parameters); "
        f"the plan's digest is now {plan.digest}"
    )


def _table(plan: StudyPlan) -> Table:
    """Field and value, section by section."""
    table = Table("field", "value", title=f"{plan.study}  {plan.digest[:16]}", show_lines=False)
    for section, value in plan.model_dump(mode="json", exclude={"initial"}).items():
        if not isinstance(value, dict):
            table.add_row(section, str(value))
            continue
        for key, inner in value.items():
            table.add_row(f"{section}.{key}", str(inner))
    if plan.initial:
        table.add_row("initial.digest", plan.initial.digest)
        table.add_row("initial.tensors", f"{len(plan.initial.tensors)}")
    return table
