"""`fedseg-site train-local`: train a model without the others, to compare the shared one with.

It is not called `train`: that is what the daemon does for a study, and `trainer` is its half that
does it. `local` is the word of the model's header, of `validate --local` and of `fedseg simulate
--baselines local`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedseg.commands.models import Device
from fedseg.shell import progress_bar
from sites.commands.options import HERE, SiteOption, StudyArgument, open_site
from sites.keyring import open_signing_key

if TYPE_CHECKING:
    from fedseg.plan import StudyPlan
    from sites.own_patients import Patients

TRAIN_EPILOG = """
Examples:

  fedseg-site train-local lung --site /var/lib/fedseg

  fedseg-site train-local lung --initial lung.initial.safetensors --device cuda

  fedseg-site validate lung lung-local --site /var/lib/fedseg
"""


def train_local(
    study: StudyArgument,
    initial: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="What the study starts from, if not its plan's seed."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A new model file; by default models/STUDY-local.safetensors."),
    ] = None,
    device: Device = "cpu",
    site: SiteOption = HERE,
) -> None:
    """Train a model on this hospital's patients alone, by a study's plan; it does not leave.

    Network, preparation, losses and steps are those of the approved plan, everybody else is left
    out: `validate` then says what the study is worth here. Held-back patients are never touched.
    Stopped, it goes on. Under a plan with a guarantee this model keeps none.
    """
    from fedseg.models.devices import require_device
    from sites.alone import start_of, train_here, trainable
    from sites.cohort import load_record
    from sites.enrolment import pinned_bundle
    from sites.finetuning import require_new
    from sites.heldback import House
    from sites.own_patients import patients_of

    folder = open_site(site)
    require_device(device)
    plan = pinned_bundle(folder, study).plan
    record = load_record(folder, study, plan)
    out = out or folder.models / f"{study}-local.safetensors"
    require_new(out)
    start = start_of(plan, initial)
    owner = House(folder, open_signing_key(folder))
    patients = patients_of(owner, plan, record)
    trainable(patients)
    with progress_bar("training", plan.aggregation.rounds) as advance:
        losses = train_here(
            plan, start, patients, owner,
            out=out, device=device, progress=lambda _loss: advance(""),
        )  # fmt: skip
    _tell(plan, patients, losses, out, out.stem if out.parent == folder.models else str(out))


def _tell(
    plan: StudyPlan, patients: Patients, losses: tuple[float, ...], out: Path, name: str
) -> None:
    """What it came to, and what it does not say."""
    console = Console(soft_wrap=True, highlight=False)
    count = len(patients.cohort.split("train").patients)
    console.print(
        f"{len(losses)} rounds of {plan.training.steps_per_round} steps on {count} patients; those "
        "of the splits `val` and `test` were not touched"
    )
    if patients.withdrawn:
        console.print(f"{patients.withdrawn} patients who withdrew were left out")
    console.print(
        f"mean loss {losses[0]:.3f} in the first round, {losses[-1]:.3f} in the last; of those "
        "whom it was trained on, so it flatters: "
        f"`fedseg-site validate {plan.study} {name}` has the fair figure"
    )
    console.print(
        f"wrote {out}: made from this hospital's patients without a guarantee, it does not leave "
        "this hospital"
    )
