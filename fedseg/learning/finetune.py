"""A shared model trained on with one hospital's own patients, stopped before it forgets.

Five kinds: `full` trains all parameters, `head` and `norms` a small part, `adapters` low-rank
updates that are folded into the weights afterwards, `ditto` all parameters with a pull towards the
shared model (Li et al., ICML 2021). Every few steps the mean Dice of the stopping patients is
measured; the best model of all is kept, and the model that was begun from is one of them, so that
fine-tuning can come to nothing but not to worse, as far as these patients tell. Steps, losses,
batches and augmentation are those of the study's rounds. Equal arguments give equal bits on a CPU
at one thread, also when stopped and gone on with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from fedseg.arrays import Arrays
from fedseg.frozen import Count, Frozen, Positive
from fedseg.learning.local import train_round
from fedseg.learning.pretraining import dice_of
from fedseg.learning.repeatable import repeatable
from fedseg.learning.sampling import Patients
from fedseg.models.devices import require_device
from fedseg.models.parts import freeze
from fedseg.models.zoo import (
    build_network,
    initial_model,
    load_tensors,
    readapted,
    state_tensors,
)
from fedseg.network import Adapters
from fedseg.plan import StudyPlan
from fedseg.promise import NoPrivacy
from fedseg.strategy import Aggregation
from fedseg.training import Schedule, Trainable

Kind = Literal["full", "head", "norms", "adapters", "ditto"]
KINDS: tuple[Kind, ...] = ("full", "head", "norms", "adapters", "ditto")
USUAL_CLIP_NORM = 1.0
_TRAINED: dict[Kind, Trainable] = {
    "full": "all", "head": "head", "norms": "norms", "adapters": "adapters", "ditto": "all",
}  # fmt: skip
_RATES: dict[Kind, float] = {"full": 0.1, "ditto": 0.1, "head": 0.5, "norms": 0.5, "adapters": 0.5}


class Finetuning(Frozen):
    """How a model is fine-tuned.

    Attributes:
        kind: what is trained; see the module.
        steps: of the optimiser, at most; rounded up to whole checks.
        check_every: steps between two looks at the stopping patients.
        patience: so many looks in a row without a better Dice end it.
        learning_rate: at its highest; None takes a tenth of the study's (half of it for the kinds
            that train a small part).
        rank: of the adapters.
        pull: lambda of ditto, the weight of lambda / 2 * ||w - shared model||^2.
        seed: of draws and augmentation.
    """

    kind: Kind = "full"
    steps: Count = 200
    check_every: Count = 20
    patience: Count = 3
    learning_rate: Positive | None = None
    rank: Count = 4
    pull: Positive = 0.1
    seed: int = 0


@dataclass(frozen=True)
class State:
    """Fine-tuning after some looks at the stopping patients.

    Attributes:
        model: as trained so far, in the schema of the network that is trained.
        optimiser: as in RoundOutcome.
        best: the best model so far, in the same schema.
        scores: mean Dice of the stopping patients at each look; the first is of the start.
    """

    model: Mapping[str, NDArray[Any]]
    optimiser: Mapping[str, NDArray[Any]]
    best: Mapping[str, NDArray[Any]]
    scores: tuple[float, ...]

    @property
    def checks(self) -> int:
        """Looks after the one at the start."""
        return len(self.scores) - 1

    @property
    def best_check(self) -> int:
        """The first look at which the Dice was highest; 0 is the start."""
        return self.scores.index(max(self.scores))


def finetuning_plan(plan: StudyPlan, settings: Finetuning) -> StudyPlan:
    """The plan by which a model of a study is fine-tuned at one site, without a guarantee.

    Raises:
        PlanError: the network has nothing of that kind, seen when it is built.
    """
    kind, checks = settings.kind, -(-settings.steps // settings.check_every)
    usual = plan.training.optimiser.learning_rate * _RATES[kind]
    optimiser = {"learning_rate": settings.learning_rate or usual, "state": "keep"}
    training = {
        "optimiser": plan.training.optimiser.model_copy(update=optimiser),
        "schedule": Schedule(warmup_rounds=0),
        "steps_per_round": settings.check_every,
        "gradient_clip_norm": plan.training.gradient_clip_norm or USUAL_CLIP_NORM,
        "trainable": _TRAINED[kind],
        "seed": settings.seed,
    }
    adapters = plan.model.adapters or Adapters(rank=settings.rank)
    tied: dict[str, Any] = {"strategy": "fedprox", "proximal_mu": settings.pull}
    changed = {
        "model": plan.model.model_copy(
            update={"adapters": adapters if kind == "adapters" else None}
        ),
        "training": plan.training.model_copy(update=training),
        "aggregation": Aggregation(
            rounds=checks, minimum_sites=1, **(tied if kind == "ditto" else {})
        ),
        "privacy": NoPrivacy(),
        "initial": None,
        "calibrated": None,
    }
    return StudyPlan.model_validate(plan.model_copy(update=changed).model_dump(mode="json"))


def finetune(
    plan: StudyPlan,
    model: Arrays,
    patients: Patients,
    stopping: Patients,
    settings: Finetuning,
    *,
    site: str,
    start: State | None = None,
    device: str = "cpu",
) -> Iterator[State]:
    """Fine-tune, giving the state after each look at the stopping patients, to the end.

    Args:
        plan: of the study that the model is of.
        model: what is begun from, in the schema of the plan's network.
        patients: labelled cases to train on.
        stopping: labelled cases of others.
        site: its name, for the seeds.
        start: what to go on from; None begins anew, and gives the state of the start first.
        device: of torch.

    Raises:
        PlanError: the network has nothing to train of that kind.
        DataError: no patient, or none whose Dice is defined.
        NotFiniteError: training ran away.
        TrustError: the model does not fit the plan's network.
    """
    own = finetuning_plan(plan, settings)
    shared = _for_network(model, plan, own)
    network = build_network(own.model, own.task).to(require_device(device))
    load_tensors(network, shared)
    freeze(network, own.training.trainable)
    state = start
    if state is None:
        state = State(shared, {}, shared, (_score(own, shared, stopping, device),))
        yield state
    load_tensors(network, state.model)
    for check in range(state.checks + 1, own.aggregation.rounds + 1):
        if has_stopped(state, settings):
            return
        outcome = train_round(
            network,
            patients,
            own,
            round_=check,
            site=site,
            optimiser_state=state.optimiser or None,
            anchor=shared,
        )
        now = state_tensors(network)
        score = _score(own, now, stopping, device)
        best = now if score > max(state.scores) else state.best
        state = State(now, outcome.optimiser_state, best, (*state.scores, score))
        yield state


def has_stopped(state: State, settings: Finetuning) -> bool:
    """True where the last looks brought nothing better."""
    return state.checks - state.best_check >= settings.patience


def finetuned_model(
    plan: StudyPlan, model: Arrays, settings: Finetuning, state: State
) -> dict[str, NDArray[Any]]:
    """The best model in the schema of the study's network, adapters folded in.

    Where nothing was better than the start, that is the model that was begun from, bit for bit.
    """
    if state.best_check == 0:
        return dict(model)
    return _for_network(state.best, finetuning_plan(plan, settings), plan)


def _for_network(arrays: Arrays, plan: StudyPlan, other: StudyPlan) -> dict[str, NDArray[Any]]:
    """Tensors of one plan's network for another's, which differs in its adapters at most."""
    if plan.model == other.model:
        return dict(arrays)
    fresh = initial_model(other)[1]
    return readapted(arrays, plan.model, other.model, plan.task, fresh)


def _score(plan: StudyPlan, model: Arrays, stopping: Patients, device: str) -> float:
    """Mean Dice over the stopping patients, on the prepared grid."""
    with repeatable(plan.training.threads, 0, torch.device(device)):
        return dice_of(plan, model, stopping, device)
