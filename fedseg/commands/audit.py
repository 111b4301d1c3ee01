"""`fedseg audit`: what an adversary could find out in spite of a plan's guarantee."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedseg.errors import DataError, PlanError
from fedseg.shell import progress_bar

if TYPE_CHECKING:
    from fedseg.learning.sampling import Patients
    from fedseg.plan import StudyPlan
    from fedseg.privacy.audit.membership import Membership
    from fedseg.privacy.audit.report import Audit

EPILOG = """Examples:

fedseg audit privacy --plan study.yaml

fedseg audit privacy --plan study.yaml --data DIR --canaries 2000 --seed 1 --json
"""

app = typer.Typer(help="Attack a plan's own guarantee.", no_args_is_help=True)


@app.callback()
def audit() -> None:
    """Attack a plan's own guarantee."""


@app.command(epilog=EPILOG)
def privacy(
    plan: Annotated[Path, typer.Option(help="A private plan that was built.")],
    data: Annotated[
        Path | None, typer.Option(help="Labelled patients to attack by membership inference.")
    ] = None,
    canaries: Annotated[
        int, typer.Option(min=1, help="Crafted patients, in the thousands.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal audits.")] = 1,
    models: Annotated[
        int, typer.Option(help="Models for membership inference, a multiple of 4.")
    ] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Epsilon from below beside the epsilon that is claimed. Exit status 1: the claim is refuted.

    With --data, models are trained on halves of the patients; what is found describes them, and is
    for the hospital's own eyes.
    """
    from dataclasses import replace

    from fedseg.plan import load_plan

    study = load_plan(plan)
    if study.private is None:
        raise PlanError("the plan gives no guarantee: there is nothing to audit")
    found = _canaries(study, canaries, seed)
    if data is not None:
        found = replace(found, membership=_membership(plan, study, data, models, seed))
    if as_json:
        typer.echo(json.dumps(found.as_json, indent=2, allow_nan=False))
    else:
        _show(found)
    if found.reasons:
        raise typer.Exit(1)


def _canaries(plan: StudyPlan, canaries: int, seed: int) -> Audit:
    """The canaries, and noise and sampling by themselves."""
    import torch

    from fedseg.learning.optimiser import trained
    from fedseg.models.parts import freeze
    from fedseg.models.zoo import build_network
    from fedseg.privacy.audit.canaries import steps_of
    from fedseg.privacy.audit.report import audited

    with torch.random.fork_rng(devices=[]):
        network = build_network(plan.model, plan.task)
    freeze(network, plan.training.trainable)
    sizes = {name: parameter.numel() for name, parameter in trained(network).items()}
    with progress_bar("canaries", steps_of(plan, canaries, sizes)) as advance:
        return audited(plan, sizes, canaries=canaries, seed=seed, progress=advance)


def _membership(path: Path, plan: StudyPlan, data: Path, models: int, seed: int) -> Membership:
    """LiRA on the training patients of a data folder, all hospitals together."""
    from fedseg.models.zoo import initial_model
    from fedseg.planfile import load_initial
    from fedseg.privacy.audit.membership import LEAST_MODELS, membership

    if models < LEAST_MODELS or models % 4:
        raise DataError(f"--models must be a multiple of 4, at least {LEAST_MODELS}, not {models}")
    initial = load_initial(path) or initial_model(plan)[1]
    with tempfile.TemporaryDirectory(prefix="fedseg-cache-") as folder:
        patients = _patients(plan, data, Path(folder) / "cache")
        with progress_bar("models", models) as advance:
            return membership(plan, initial, patients, models=models, seed=seed, progress=advance)


def _patients(plan: StudyPlan, data: Path, cache: Path) -> Patients:
    """Prepared training patients of all sites."""
    from fedseg.imaging.cache import CaseCache
    from fedseg.imaging.cohorts import usable_cohorts
    from fedseg.imaging.manifests import read_manifest

    manifest = read_manifest(data, plan.task, seed=plan.training.seed)
    with progress_bar("inspecting", len(manifest.cases)) as advance:
        cohorts, _ = usable_cohorts(manifest, plan.task, advance)
    prepared = CaseCache(cache, plan.task)
    return {
        f"{site}/{patient}": [prepared.load(case, own.cohort.label_map) for case in cases]
        for site, own in cohorts.items()
        for patient, cases in own.cohort.split("train").by_patient()
        if all(case.label is not None for case in cases)
    }


def _show(found: Audit) -> None:
    """Figures and verdict for people."""
    table = Table("", "epsilon", "ceiling", "guesses right", title="audit of the privacy claim")
    table.add_row(f"claimed, at delta {found.delta:g}", f"{found.claimed:.4g}", "", "")
    table.add_row("by the accountant", f"{found.accounted:.4g}", "", "")
    bounds = [("at least", found.bound), ("at least, any mechanism", found.any_mechanism)]
    if found.metrics is not None:
        accounted = f"{found.metrics.accounted:.4g}"
        table.add_row("noised metrics, by the accountant", accounted, "", "")
        bounds.append(("noised metrics, at least", found.metrics.bound))
    for name, bound in bounds:
        table.add_row(
            f"{name} ({bound.confidence:.0%} confidence)",
            f"{bound.epsilon:.3f}",
            f"{bound.ceiling:.2f}",
            f"{bound.right} of {bound.guesses}",
        )
    console = Console()
    console.print(table)
    for check in found.checks:
        console.print(
            f"{check.what}: expected {check.expected:.4g}, found {check.found:.4g} "
            f"(p = {check.p:.2g})",
            soft_wrap=True,
        )
    if found.membership is not None:
        console.print(found.membership.text, soft_wrap=True)
    console.print(found.text, style="red" if found.reasons else None, soft_wrap=True)
