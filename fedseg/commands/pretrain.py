"""`fedseg pretrain`: an initial model from public patients or from phantoms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedseg.errors import DataError, TrustError
from fedseg.frozen import Digest, Frozen
from fedseg.shell import progress_bar

if TYPE_CHECKING:
    from fedseg.learning.pretraining import State
    from fedseg.learning.sampling import Patients
    from fedseg.plan import StudyPlan

EPILOG = """Examples:

fedseg pretrain study.yaml --out start.safetensors

fedseg pretrain study.yaml --out start.safetensors --data PUBLIC_COHORT --steps 4000

fedseg plan build study.yaml --from start.safetensors
"""
HELD_BACK = 24
SAVE_EVERY = 4  # chunks
MAX_BYTES = 64 * 1024**3


class Progress(Frozen):
    """The header of what is kept of a pre-training that was stopped."""

    format: Literal["fedseg-pretraining/1"] = "fedseg-pretraining/1"
    recipe: Digest
    chunks: int


def run(
    plan: Annotated[Path, typer.Argument(help="The study plan: its task and network.")],
    out: Annotated[Path, typer.Option(help="The model file to write.")],
    data: Annotated[
        Path | None, typer.Option(help="A public, labelled cohort; else phantoms are made.")
    ] = None,
    anatomy: Annotated[
        Literal["chain", "apart", "nested"],
        typer.Option(help="Of phantoms: labels along a tube from front to back, apart, or nested."),
    ] = "chain",
    phantoms: Annotated[int, typer.Option(min=2, help="How many different phantoms.")] = 600,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser, in fifties.")] = 3000,
    learning_rate: Annotated[float, typer.Option(min=1e-6, help="Of AdamW, highest.")] = 0.005,
    batch_size: Annotated[int, typer.Option(min=1, help="Patches a step.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, phantoms and draws.")] = 1,
    table: Annotated[str | None, typer.Option(help="Which CSV of the data folder.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Prepared cases; else a folder beside the model.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
) -> None:
    """Train an initial model of a plan's network on public data. Stopped, it goes on.

    Take only data that need no protection: the study's guarantee does not cover them.
    """
    from fedseg.learning.pretraining import dice_of, phantom_patients, pretraining_plan
    from fedseg.modelfile import save_model
    from fedseg.plan import load_plan

    if out.exists():
        raise DataError(f"{out.name} is there already: name another file")
    own = pretraining_plan(
        load_plan(plan),
        steps=steps,
        seed=seed,
        learning_rate=learning_rate,
        batch_size=batch_size,
    )
    patients: Patients
    held_back: Patients
    if data is None:
        patients = phantom_patients(own.task, seed, range(phantoms), anatomy)
        beyond = range(phantoms, phantoms + HELD_BACK)
        held_back = phantom_patients(own.task, seed, beyond, anatomy)
        source = f"phantoms {anatomy} {phantoms}"
    else:
        patients, held_back, source = _cohort(own, data, table, cache or _cache_beside(out))
    state = _train(own, patients, _digest(own, source), out, device)
    save_model(out, own, state.model, arm="pretrained", rounds=state.chunks)
    _kept(out).unlink(missing_ok=True)
    typer.echo(f"wrote {out}; start a study from it: fedseg plan build {plan} --from {out}")
    if held_back:
        found = dice_of(own, state.model, held_back, device)
        typer.echo(f"mean Dice of {len(held_back)} held-back patients: {found:.3f}")


def _train(own: StudyPlan, patients: Patients, recipe: str, out: Path, device: str) -> State:
    """Train to the end, keeping what is needed to go on."""
    from fedseg.learning.pretraining import pretrain

    chunks = own.aggregation.rounds
    last = _resumed(_kept(out), recipe, chunks)
    with progress_bar("pre-training", chunks) as advance:
        for _ in range(last.chunks if last else 0):
            advance("")
        for state in pretrain(own, patients, start=last, device=device):
            advance("")
            last = state
            if state.chunks % SAVE_EVERY == 0 or state.chunks == chunks:
                _keep(_kept(out), recipe, state)
    assert last is not None  # a plan has at least one round
    return last


def _kept(out: Path) -> Path:
    """Where a pre-training that was stopped is kept."""
    return out.with_name(out.name + ".unfinished")


def _cache_beside(out: Path) -> Path:
    """Prepared cases of a public cohort."""
    return out.with_name(out.stem + ".cache")


def _keep(path: Path, recipe: str, state: State) -> None:
    """Write model and optimiser state, whole or not at all."""
    from fedseg.container import packed
    from fedseg.durable import write_atomically

    arrays = {f"model/{name}": array for name, array in state.model.items()}
    arrays |= {f"optimiser/{name}": array for name, array in state.optimiser.items()}
    write_atomically(path, packed(Progress(recipe=recipe, chunks=state.chunks), arrays))


def _resumed(path: Path, recipe: str, chunks: int) -> State | None:
    """What was kept of the same pre-training, or None where nothing was.

    Raises:
        DataError: another pre-training was stopped there.
    """
    from fedseg.container import unpack
    from fedseg.learning.pretraining import State

    if not path.exists():
        return None
    try:
        header, arrays = unpack(path.read_bytes(), Progress, max_bytes=MAX_BYTES, schema=None)
    except TrustError:
        header, arrays = None, {}
    if header is None or header.recipe != recipe or header.chunks > chunks:
        raise DataError(
            f"{path.name} is of another pre-training (plan, data, seed or settings differ): remove "
            "it to begin anew, or name another --out"
        )

    def part(prefix: str) -> Mapping[str, Any]:
        return {
            name.removeprefix(prefix): array.copy()
            for name, array in arrays.items()
            if name.startswith(prefix)
        }

    return State(header.chunks, part("model/"), part("optimiser/"))


def _digest(own: StudyPlan, source: str) -> str:
    """What must be equal for a pre-training to go on."""
    return hashlib.sha256(json.dumps([own.digest, source]).encode()).hexdigest()


def _cohort(
    own: StudyPlan, data: Path, table: str | None, cache: Path
) -> tuple[Patients, Patients, str]:
    """A public cohort's labelled patients: to train on, held back, and a digest of its files."""
    from fedseg.evaluation.evaluate import labelled
    from fedseg.imaging.cache import CaseCache
    from fedseg.imaging.cases import Cohort
    from fedseg.imaging.cohorts import usable_cohorts
    from fedseg.imaging.fingerprint import fingerprint
    from fedseg.imaging.manifests import read_manifest
    from fedseg.learning.pretraining import cohort_patients

    manifest = read_manifest(data, own.task, table=table, seed=own.training.seed)
    with progress_bar("inspecting", len(manifest.cases)) as advance:
        found, _ = usable_cohorts(manifest, own.task, advance)
    cases = tuple(case for usable in found.values() for case in usable.cohort.cases)
    whole = labelled(Cohort("public", cases, manifest.label_map))
    train, held_back = whole.split("train"), whole.split("val")
    if not train.cases:
        raise DataError(
            "the data have no usable labelled case in the split train: see `fedseg-site check`"
        )
    prepared = CaseCache(cache, own.task)
    return (
        cohort_patients(train, prepared),
        cohort_patients(held_back, prepared),
        fingerprint([whole])["public"],
    )
