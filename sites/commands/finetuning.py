"""`fedseg-site finetune`: train a shared model on with this hospital's own patients."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from fedseg.commands.models import Device
from fedseg.errors import DataError
from fedseg.shell import progress_bar
from sites.commands.models import model_file
from sites.commands.options import HERE, SiteOption
from sites.commands.own_data import (
    CacheOption,
    RowOption,
    TableOption,
    cache_or_temporary,
    house_at,
)

if TYPE_CHECKING:
    from fedseg.learning.finetuned import Finetuned
    from fedseg.learning.stopping import Division
    from fedseg.plan import StudyPlan
    from sites.heldback import House
    from sites.own_patients import Patients

FINETUNE_EPILOG = """
Examples:

  fedseg-site finetune lung --site /var/lib/fedseg

  fedseg-site finetune lung --kind norms --steps 400 --patience 5 --site /var/lib/fedseg

  fedseg-site finetune OUT/model.safetensors --data DIR --row hospital_a --out own.safetensors
"""


def finetune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A study whose model has arrived, or a file.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="A data folder; by default the one approved with the model's plan."),
    ] = None,
    table: TableOption = None,
    row: RowOption = None,
    kind: Annotated[
        Literal["full", "head", "norms", "adapters", "ditto"],
        typer.Option(help="What is trained; ditto is pulled towards the shared model."),
    ] = "full",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser, at most.")] = 200,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-9, help="Highest; by default a share of the study's.")
    ] = None,
    check_every: Annotated[
        int, typer.Option(min=1, help="Steps between two looks at the patients who say stop.")
    ] = 20,
    patience: Annotated[
        int, typer.Option(min=1, help="So many looks without a better Dice end it.")
    ] = 3,
    rank: Annotated[int, typer.Option(min=1, max=256, help="Of adapters.")] = 4,
    pull: Annotated[
        float, typer.Option(min=1e-9, help="Of ditto: lambda, towards the shared model.")
    ] = 0.1,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of draws and of who says stop; the study's.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A new model file; by default models/STUDY-finetuned.safetensors."),
    ] = None,
    cache: CacheOption = None,
    device: Device = "cpu",
    site: SiteOption = HERE,
) -> None:
    """Fine-tune a model on this hospital's patients; what comes out does not leave it.

    Some patients are not trained on but say when to stop: `val` where there is a `test` split, else
    a part of `train`. Patients kept for the final validation are never touched. Stopped, it goes
    on. Fine-tuning under a privacy guarantee is not offered.
    """
    from fedseg.learning.finetune import Finetuning
    from fedseg.learning.finetuned import looks
    from fedseg.modelfile import load_model
    from fedseg.models.devices import require_device
    from sites.finetuning import finetune_here, require_new

    owner = house_at(site, data)
    if owner is not None and cache:
        raise DataError("--cache is for a data folder without a site: a site has its own")
    require_device(device)
    start = model_file(model, site)
    plan = load_model(start)[0].plan
    out = out or _usual_out(owner, plan)
    require_new(out)
    settings = Finetuning(
        kind=kind,
        steps=steps,
        check_every=check_every,
        patience=patience,
        learning_rate=learning_rate,
        rank=rank,
        pull=pull,
        seed=plan.training.seed if seed is None else seed,
    )
    patients = _patients(owner, plan, data, table, row)
    with ExitStack() as stack:
        prepared = owner.folder.cache if owner else cache_or_temporary(cache, stack)
        advance = stack.enter_context(progress_bar("fine-tuning", looks(plan, settings)))
        tuned, parts = finetune_here(
            start, patients, settings,
            out=out, cache=prepared, owner=owner, device=device,
            progress=lambda _state: advance(""),
        )  # fmt: skip
    _tell(tuned, parts, patients, out, settings.check_every)


def _usual_out(owner: House | None, plan: StudyPlan) -> Path:
    """Where the result goes if nobody says."""
    name = f"{plan.study}-finetuned.safetensors"
    return Path(name) if owner is None else owner.folder.models / name


def _patients(
    owner: House | None, plan: StudyPlan, data: Path | None, table: str | None, row: str | None
) -> Patients:
    """Whom to train on."""
    from sites.own_patients import approved_patients, patients_in

    if data is not None:
        return patients_in(
            data.absolute(),
            plan,
            owner=owner,
            table=table,
            row=row,
            progress=lambda cases: progress_bar("inspecting", cases),
        )
    assert owner is not None  # without a data folder there is a site
    if table or row:
        raise DataError("--table and --row belong to --data: the approved data need neither")
    return approved_patients(owner, plan)


def _tell(
    tuned: Finetuned, parts: Division, patients: Patients, out: Path, check_every: int
) -> None:
    """What it came to, and what it does not say."""
    console = Console(soft_wrap=True, highlight=False)
    training, stopping = len(parts.training.patients), len(parts.stopping.patients)
    console.print(
        f"{tuned.steps} steps on {training} patients; {stopping} others said when to stop, and "
        f"those of the split `{parts.final}` were not touched"
    )
    if patients.withdrawn:
        console.print(f"{patients.withdrawn} patients who withdrew were left out")
    if not tuned.best_check:
        raise DataError(
            f"nothing was better for the {stopping} patients than the model as it came (mean Dice "
            f"{tuned.scores[0]:.3f}), so no file was written: use it as it is, or try another "
            "--kind or a lower --learning-rate"
        )
    console.print(
        f"mean Dice of the {stopping}: {tuned.scores[0]:.3f} before, {max(tuned.scores):.3f} after "
        f"{tuned.best_check * check_every} steps; this chose the model, so it flatters it: "
        "`fedseg-site validate` has the fair figure"
    )
    console.print(
        f"wrote {out}: made from this hospital's patients without a guarantee, it does not leave "
        "this hospital"
    )
