"""`fedseg demo`: everything at once, on phantoms or on the user's own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedseg.commands import simulations
from fedseg.plan import parse_plan
from fedseg.planfile import example, write_example

EPILOG = """Examples:

fedseg demo --out demo

fedseg demo --out demo-mr --data DIR --study study.yaml
"""


def run(
    out: Annotated[Path, typer.Option(help="Folder for data, plan, model and report.")] = Path(
        "demo"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Your own data folder instead of phantoms.")
    ] = None,
    study: Annotated[
        Path | None, typer.Option(help="Your own plan; else the phantoms' or the hippocampus one.")
    ] = None,
) -> None:
    """Train five hospitals together, pooled and alone, and write a report. Stopped, it goes on."""
    from fedseg.imaging.phantoms import write_phantoms

    if data is not None:
        out = out / "own-data"
    plan = study or out / "study.yaml"
    if study is None and not plan.exists():
        text = example("phantoms" if data is None else "mr-3d")
        parse_plan(text.encode())
        out.mkdir(parents=True, exist_ok=True)
        write_example(plan, text)
    if data is None:
        data = out / "data"
        if not (data / "sites.csv").exists():
            typer.echo("making phantoms of five hospitals")
            write_phantoms(data, patients_per_site=12)
    simulations.run(
        plan, data, out / "study", resume=(out / "study").exists(), baselines="pooled,local"
    )
