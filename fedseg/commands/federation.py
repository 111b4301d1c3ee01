"""`fedseg federation`: a real federation on this machine, from enrolment to the final model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedseg.durable import write_atomically
from fedseg.errors import RoundError
from fedseg.plan import StudyPlan, load_plan, parse_plan
from fedseg.planfile import build, example, initial_path
from fedseg.strategy import Strategy

if TYPE_CHECKING:
    from fedseg.simulation.deployment import Deployment

EPILOG = """Examples:

fedseg federation --out federation

fedseg federation --out federation --sites 4 --rounds 10

fedseg federation --out scaffold --strategy scaffold
"""
TIMEOUT_S = 3600.0
# What a strategy cannot do without.
NEEDED: dict[Strategy, dict[str, dict[str, Any]]] = {
    "fedprox": {"aggregation": {"proximal_mu": 0.01}},
    "ditto": {"aggregation": {"ditto_lambda": 0.1}},
    "scaffold": {
        "training": {
            "optimiser": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.0, "state": "reset"}
        }
    },
}


def run(
    out: Annotated[Path, typer.Option(help="Folder for coordinator, hospitals and data.")] = Path(
        "federation"
    ),
    sites: Annotated[int, typer.Option(min=2, max=8, help="How many hospitals.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training.")] = 4,
    strategy: Annotated[
        Strategy, typer.Option(help="How the hospitals learn together: docs/strategies.md.")
    ] = "fedavg",
    compare: Annotated[
        bool, typer.Option(help="Simulate the same study too and compare the models.")
    ] = True,
) -> None:
    """Start a coordinator and hospitals as processes of their own and run a study over TLS.

    Every command that is typed is shown: a consortium and its hospitals would type the same on
    machines of their own. Stopped, the same command goes on.
    """
    from fedseg.imaging.phantoms import write_phantoms
    from fedseg.simulation.deployment import Deployment, Watcher
    from fedseg.simulation.hospitals import divide

    console = Console(highlight=False)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan_file, data = out / "study.yaml", out / "data"
    if not plan_file.exists():
        write_plan(plan_file, rounds, sites, strategy)
    if not (data / "sites.csv").exists():
        console.print(f"making phantoms of {sites} hospitals")
        write_phantoms(data, sites=sites, patients_per_site=6)
    deployment = Deployment(out, plan_file, divide(data, out / "data-of"), say=console.print)
    deployment.set_up()
    started = time.monotonic()
    watch = Watcher(console.print)
    try:
        deployment.start_all()
        last = deployment.wait(lambda progress: progress.finished, TIMEOUT_S, watch)
        watch(last)
    finally:
        deployment.stop_all()
    console.print(f"finished in {time.monotonic() - started:.0f} s")
    _conclude(console, deployment, data, out, compare=compare)


def write_plan(path: Path, rounds: int, sites: int, strategy: Strategy = "fedavg") -> StudyPlan:
    """The phantoms' plan with fewer rounds, and with it the model that it starts from."""
    plan = parse_plan(example("phantoms").encode())
    value = plan.model_dump(mode="json", exclude={"initial"})
    value["study"] = "federation"
    value["training"]["schedule"]["warmup_rounds"] = 0
    value["aggregation"] = {
        "strategy": strategy, "rounds": rounds, "minimum_sites": sites, "round_timeout_s": 900,
    }  # fmt: skip
    for section, fields in NEEDED.get(strategy, {}).items():
        value[section] |= fields
    value["evaluation"]["every_rounds"] = rounds
    return write_plan_file(path, value)


def write_plan_file(path: Path, value: dict[str, Any]) -> StudyPlan:
    """Write a plan and build it; the file is there only when its initial model is."""
    draft = path.with_name("draft.yaml")
    write_atomically(draft, json.dumps(value, indent=1).encode())
    build(draft)
    initial_path(draft).replace(initial_path(path))
    draft.replace(path)
    return load_plan(path)


def _conclude(
    console: Console, deployment: Deployment, data: Path, out: Path, *, compare: bool
) -> None:
    """What came out, and whether the simulation gives the same.

    Raises:
        RoundError: the simulation gives another model.
    """
    from fedseg.modelfile import load_model
    from fedseg.planfile import load_initial
    from fedseg.simulation.federation import site_folder
    from fedseg.simulation.options import Options
    from fedseg.simulation.study import simulate

    study = deployment.plan.study
    file = f"models/{study}.safetensors"
    models = {name: deployment.site(name).path / file for name in deployment.data}
    digests = {name: load_model(path)[0].model_digest for name, path in models.items()}
    for name, path in models.items():
        console.print(f"{name} holds the final model: {path.relative_to(out)}")
    if not compare:
        return
    console.print("simulating the same study in one process")
    options = Options(
        initial=load_initial(deployment.plan_file), resume=(out / "simulated").exists()
    )
    result = simulate(deployment.plan, data, out / "simulated", options)
    folders = {name: site_folder(out / "simulated" / "federated", name) for name in models}
    simulated = {name: load_model(path / file)[0].model_digest for name, path in folders.items()}
    if digests != simulated:
        raise RoundError(f"the simulation gives other models: {simulated}, not {digests}")
    console.print(
        f"the simulation gives the same model, bit for bit: {result.model_digest[:16]}..."
    )
    console.print(f"its report: {out / 'simulated' / 'report.html'}")
