"""Fine-tuning to its end, in a file that a kill cannot hurt.

After each look at the stopping patients all that is needed to go on lies in one file: killed and
started again, it ends with the same bits. The file is of one recipe (model, plan, settings, site
and patients); it is not taken for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from numpy.typing import NDArray
from pydantic import Field

from fedseg.arrays import Arrays, digest_of
from fedseg.learning.finetune import (
    Finetuning,
    State,
    finetune,
    finetuned_model,
    finetuning_plan,
)
from fedseg.learning.sampling import Patients
from fedseg.learning.unfinished import Unfinished, put_aside, recipe_of, take_up
from fedseg.modelfile import FINETUNED, save_model
from fedseg.plan import StudyPlan

_PARTS = ("model", "optimiser", "best")


@dataclass(frozen=True)
class Finetuned:
    """What fine-tuning came to.

    Attributes:
        model: the best, in the schema of the study's network.
        scores: mean Dice of the stopping patients at each look; the first is of the start.
        best_check: the look at which the model was the best; 0 where the start stayed the best.
        steps: of the optimiser, all that were taken.
    """

    model: dict[str, NDArray[Any]]
    scores: tuple[float, ...]
    best_check: int
    steps: int

    @property
    def gain(self) -> float:
        """Dice of the stopping patients above that of the start; never below 0, and hopeful."""
        return max(self.scores) - self.scores[0]


class _Kept(Unfinished):
    """The header of the file."""

    format: Literal["fedseg-finetuning/1"] = "fedseg-finetuning/1"
    scores: Annotated[tuple[float, ...], Field(min_length=1)]


def finetune_to_the_end(
    plan: StudyPlan,
    model: Arrays,
    patients: Patients,
    stopping: Patients,
    settings: Finetuning,
    *,
    site: str,
    kept: Path,
    data: str,
    device: str = "cpu",
    progress: Callable[[State], None] = lambda _state: None,
) -> Finetuned:
    """Fine-tune, or go on with what a file holds of it.

    Args:
        plan, model, patients, stopping, settings, site, device: see `finetune`.
        kept: the file; it stays when all is done, and is then only read.
        data: the digest of the patients' data.
        progress: is told of every state, those before a kill not again.

    Raises:
        DataError: the file is of another recipe; and as `finetune`.
        PlanError, NotFiniteError, TrustError: as `finetune`.
        StorageError: the file cannot be written.
    """
    named = [sorted(patients), sorted(stopping)]
    how = settings.model_dump(mode="json")
    recipe = recipe_of(plan.digest, digest_of(model), how, site, data, named)
    state = last = _read(kept, recipe)
    if last is not None:
        progress(last)
    for state in finetune(
        plan, model, patients, stopping, settings, site=site, start=last, device=device
    ):
        _write(kept, recipe, state)
        progress(state)
    assert state is not None  # the first state is of the start
    steps = state.checks * settings.check_every
    tuned = finetuned_model(plan, model, settings, state)
    return Finetuned(tuned, state.scores, state.best_check, steps)


def save_finetuned(
    path: Path, plan: StudyPlan, tuned: Finetuned, *, rounds: int, released: str
) -> None:
    """Write the model file of a fine-tuned model, readable by its owner alone.

    Args:
        plan: of the study.
        rounds: of the study, before.
        released: digest of the shared model that it comes from.

    Raises:
        StorageError: it cannot be written.
    """
    save_model(path, plan, tuned.model, arm=FINETUNED, rounds=rounds, released=released, mode=0o600)


def looks(plan: StudyPlan, settings: Finetuning) -> int:
    """How many states there will be at most, the one of the start among them."""
    return finetuning_plan(plan, settings).aggregation.rounds + 1


def _write(path: Path, recipe: str, state: State) -> None:
    """Keep a state in place of the one before."""
    header = _Kept(recipe=recipe, scores=state.scores)
    put_aside(path, header, {part: getattr(state, part) for part in _PARTS})


def _read(path: Path, recipe: str) -> State | None:
    """What was kept of the same recipe, or None where nothing was.

    Raises:
        DataError: another one was stopped there.
    """
    work = "fine-tuning (model, patients, seed or settings differ)"
    found = take_up(path, _Kept, recipe, work)
    if found is None:
        return None
    header, parts = found
    model, optimiser, best = (parts.get(name, {}) for name in _PARTS)
    return State(model, optimiser, best, header.scores)
