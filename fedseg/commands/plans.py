"""`fedseg plan`: write, check, show and build a study plan."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedseg import planfile
from fedseg.plan import StudyPlan, load_plan
from fedseg.privacy.words import in_one_line, not_covered

if TYPE_CHECKING:
    from fedseg.privacy.guarantee import Guarantee

app = typer.Typer(
    help="Write, check, show and build a study plan.",
    no_args_is_help=True,
)
PlanPath = Annotated[Path, typer.Argument(help="The plan file, for example study.yaml.")]


@app.command(
    epilog="Examples:  fedseg plan new study.yaml    "
    "fedseg plan new study.yaml --example mr-3d-private"
)
def new(
    path: PlanPath,
    example: Annotated[
        str,
        typer.Option(
            help="mr-3d (every field without a guarantee), mr-3d-private (with one) or ct-2d."
        ),
    ] = "mr-3d",
) -> None:
    """Write a commented example plan to start from."""
    if example not in planfile.EXAMPLES:
        raise typer.BadParameter(f"choose one of {', '.join(planfile.EXAMPLES)}")
    planfile.write_example(path, planfile.example(example))
    typer.echo(f"wrote {path}; edit it, then: fedseg plan check {path}")


@app.command(epilog="Example:  fedseg plan check study.yaml")
def check(path: PlanPath) -> None:
    """Check every field, how fields fit, and that the noise keeps the guarantee; else exit 1."""
    plan = planfile.load_written(path)
    if plan.private and plan.calibrated:
        from fedseg.privacy.promised import require_kept

        require_kept(plan)
    built = "built" if plan.initial else "not built yet: fedseg plan build"
    typer.echo(f"{path} holds: study {plan.study}, digest {plan.digest} ({built})")
    typer.echo("\n".join(f"{name}: {value}" for name, value in _privacy(plan)))


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
    count, part = sum(prod(spec.shape) for spec in plan.built.tensors), plan.training.trainable
    trained = "all" if part == "all" else f"{_trained(plan):,} of them"
    typer.echo(
        f"wrote {planfile.initial_path(path)} ({count / 1e6:.2f} M parameters, {trained} trained); "
        f"the plan's digest is now {plan.digest}"
    )
    if plan.private:
        typer.echo("\n".join(f"{name}: {value}" for name, value in _privacy(plan)))


def _trained(plan: StudyPlan) -> int:
    """How many parameters the sites train."""
    from fedseg.models.parts import freeze
    from fedseg.models.zoo import build_network

    network = build_network(plan.model, plan.task)
    return sum(network.get_parameter(n).numel() for n in freeze(network, plan.training.trainable))


def _table(plan: StudyPlan) -> Table:
    """Field and value, section by section."""
    table = Table("field", "value", title=f"{plan.study}  {plan.digest[:16]}", show_lines=False)
    for section, value in plan.model_dump(mode="json", exclude={"initial"}).items():
        if not isinstance(value, dict):
            table.add_row(section, str(value))
            continue
        for key, inner in value.items():
            table.add_row(f"{section}.{key}", str(inner))
    for name, value in _privacy(plan):
        table.add_row(name, value)
    if plan.initial:
        table.add_row("initial.digest", plan.initial.digest)
        table.add_row("initial.tensors", f"{len(plan.initial.tensors)}")
    return table


def _privacy(plan: StudyPlan) -> list[tuple[str, str]]:
    """The guarantee, the noise and the epsilon that this noise gives, in names and values."""
    found = [("privacy guarantee", in_one_line(plan))]
    if plan.private is None:
        return found
    found.append(("besides", not_covered(plan)))
    if plan.calibrated is None:
        return [*found, ("noise", "not calibrated yet: fedseg plan build")]
    from fedseg.privacy.promised import promised

    given, noise = promised(plan), plan.noise
    found.append(_noise("training", noise.training, given.train, plan.private.epsilon))
    if noise.metrics is not None and given.held_back is not None:
        found.append(_noise("metrics", noise.metrics, given.held_back, plan.private.epsilon))
    return found


def _noise(what: str, multiplier: float, given: Guarantee, most: float) -> tuple[str, str]:
    """One kind of noise, and what it gives over the whole schedule."""
    steps = sum(each.steps for each in given.mechanisms)
    weak = f", MORE THAN PROMISED ({most:g})" if given.epsilon > most else ""
    return (
        f"noise for {what}",
        f"multiplier {multiplier:.4g} in each of {steps} releases gives epsilon "
        f"{given.epsilon:.4g} at delta {given.delta:g}{weak} (RDP {given.rdp_epsilon:.4g})",
    )
