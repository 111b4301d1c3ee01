"""`fedseg simulate`: a whole federation on one machine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from fedseg.errors import PlanError
from fedseg.plan import load_plan
from fedseg.planfile import load_initial
from fedseg.privacy.guarantee import rounded_up
from fedseg.privacy.words import NONE
from fedseg.result import StudyResult, mean_of

EPILOG = """Examples:

fedseg simulate study.yaml --data DIR --out OUT --baselines pooled,local

fedseg simulate study.yaml --data DIR --out OUT --resume

fedseg simulate study.yaml --data DIR --out OUT --finetune-kind norms --finetune-steps 200

fedseg simulate study.yaml --data DIR --out OUT --engine ray

fedseg simulate study.yaml --data DIR --out OUT --fault hospital_b:crash@3

fedseg simulate study.yaml --data DIR --out OUT --without hospital_a:tumour
"""


def run(
    plan: Annotated[Path, typer.Argument(help="The study plan, for example study.yaml.")],
    data: Annotated[Path, typer.Option(help="A data folder, as `fedseg-site check` reads it.")],
    out: Annotated[Path, typer.Option(help="A new folder for model, result and report.")],
    engine: Annotated[
        Literal["inprocess", "ray"], typer.Option(help="One process, or Ray's workers.")
    ] = "inprocess",
    resume: Annotated[bool, typer.Option(help="Go on with a study that was stopped.")] = False,
    baselines: Annotated[
        str, typer.Option(help="Arms to train beside the federation: pooled,local.")
    ] = "",
    fault: Annotated[
        list[str] | None, typer.Option(help="SITE:KIND@ROUND: a hospital that fails or lies.")
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="SITE:LABEL, train this hospital as if it did not annotate the label; models are "
            "measured on all that is drawn there."
        ),
    ] = None,
    table: Annotated[str | None, typer.Option(help="Which CSV of the data folder.")] = None,
    partition: Annotated[
        str | None, typer.Option(help="For data without sites: iid or dirichlet:ALPHA.")
    ] = None,
    sites: Annotated[
        int | None, typer.Option(min=1, help="How many sites to divide into (5).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    noise_seed: Annotated[
        int | None,
        typer.Option(min=0, help="Repeat a private plan's noise: for science, NOT PRIVATE."),
    ] = None,
    finetune: Annotated[
        bool, typer.Option(help="Have each hospital fine-tune for itself in the end.")
    ] = True,
    finetune_kind: Annotated[
        Literal["full", "head", "norms", "adapters", "ditto"],
        typer.Option(help="What fine-tuning trains; ditto is pulled towards the shared model."),
    ] = "full",
    finetune_steps: Annotated[
        int, typer.Option(min=1, help="Steps of fine-tuning at each hospital, at most.")
    ] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Simulate a study: federation, baselines, measurements and a report."""
    from fedseg.simulation import Options, simulate
    from fedseg.simulation.display import Display
    from fedseg.simulation.finetuning import SIMULATED
    from fedseg.simulation.partial import parse_without
    from fedseg.simulation.rehearsal import parse_fault

    study = load_plan(plan)
    options = Options(
        engine=engine,
        resume=resume,
        baselines=tuple(_baseline(name) for name in baselines.split(",") if name),
        faults=tuple(parse_fault(text) for text in fault or ()),
        table=table,
        partition=partition,
        sites=sites,
        device=device,
        initial=load_initial(plan),
        noise_seed=noise_seed,
        without=tuple(parse_without(text) for text in without or ()),
        finetune=SIMULATED.model_copy(update={"kind": finetune_kind, "steps": finetune_steps})
        if finetune
        else None,
    )
    logging.getLogger("coordinator").setLevel(logging.ERROR)
    console = Console(stderr=as_json)
    with Display(study, console, seeded=noise_seed is not None) as display:
        result = simulate(study, data, out, options, display)
    if as_json:
        typer.echo(json.dumps(result.model_dump(mode="json")))
        return
    console.print(summary(result))
    console.print(privacy(result), highlight=False)
    console.print(f"report: {out / 'report.html'}   model: {out / 'model.safetensors'}")


def summary(result: StudyResult) -> Table:
    """Mean Dice by hospital and arm."""
    names = [arm.name for arm in result.arms]
    table = Table("hospital", *names, title=f"mean Dice on `{result.split}` patients")
    for site in result.sites:
        row = [_mean([p.mean_dice for p in arm.of_site(site.name)]) for arm in result.arms]
        table.add_row(site.name, *row)
    table.add_section()
    table.add_row("all", *(_mean([p.mean_dice for p in arm.patients]) for arm in result.arms))
    return table


def privacy(result: StudyResult) -> str:
    """What the study guaranteed to patients, in one line; loudly where that is nothing."""
    record = result.guarantee
    if record is None:
        return f"[bold red]privacy guarantee: NONE[/]{NONE.removeprefix('None')}"
    if not record.private:
        return "[bold red]NOT PRIVATE[/]: the noise was seeded and can be taken away again."
    return (
        f"privacy: epsilon {rounded_up(record.epsilon_spent)} of {record.epsilon:g} spent at delta "
        f"{record.delta:g}, for each patient that a hospital trained on"
    )


def _baseline(name: str) -> Literal["pooled", "local"]:
    """A baseline by name."""
    if name == "pooled":
        return "pooled"
    if name == "local":
        return "local"
    raise PlanError(f"--baselines takes pooled and local, divided by a comma, not {name!r}")


def _mean(values: list[float | None]) -> str:
    """A mean for a table."""
    mean = mean_of({str(i): value for i, value in enumerate(values)})
    return "-" if mean is None else f"{mean:.3f}"
