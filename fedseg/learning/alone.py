"""A hospital that trains without the others, round by round, to the end.

It is what a federation of one computes, without the messages: the same rounds of training, the
same exact sum of one update, the same server's step. So the model is that of a simulation's
`local:SITE`, bit for bit on a CPU at one thread. After each round all that is needed to go on lies
in one file: killed and started again, it ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedseg.aggregation.accumulate import MeanAccumulator
from fedseg.aggregation.rounds import weight_of
from fedseg.aggregation.server import Model, ServerState, apply_update
from fedseg.arrays import Arrays
from fedseg.learning.sampling import Patients
from fedseg.learning.strategies import Memory, Tensors, train_by_strategy
from fedseg.learning.unfinished import Unfinished, put_aside, recipe_of, take_up
from fedseg.models.devices import require_device
from fedseg.models.parts import freeze, require_division
from fedseg.models.zoo import build_network
from fedseg.plan import StudyPlan
from fedseg.updates import Trained


@dataclass(frozen=True)
class State:
    """Training after some rounds.

    Attributes:
        server: the model, and its moving average where the plan asks for one.
        optimiser: as in RoundOutcome.
        losses: mean of each round.
    """

    server: ServerState
    optimiser: Tensors
    losses: tuple[float, ...] = ()


class _Kept(Unfinished):
    """The header of the file."""

    format: Literal["fedseg-alone/1"] = "fedseg-alone/1"
    losses: tuple[float, ...]


def rounds_alone(
    plan: StudyPlan, start: State, patients: Patients, *, site: str, device: str = "cpu"
) -> Iterator[State]:
    """Train alone, giving the state after each round, to the plan's last.

    Args:
        plan: as `fedseg.alone.plan_alone` gives it.
        start: what to go on from.
        patients: labelled cases to train on.
        site: its name, for the seeds.
        device: of torch.

    Raises:
        PlanError: the network has nothing to train as the plan says.
        DataError: no patient.
        NotFiniteError, RoundError: training ran away.
        TrustError: the model does not fit the plan's network.
    """
    network = build_network(plan.model, plan.task).to(require_device(device))
    freeze(network, plan.training.trainable)
    require_division(network, plan)
    state = start
    for round_ in range(state.server.steps + 1, plan.aggregation.rounds + 1):
        outcome, update, memory = train_by_strategy(
            network,
            patients,
            plan,
            round_=round_,
            site=site,
            model=state.server.model,
            control={},
            memory=Memory(optimiser=state.optimiser),
        )
        said = Trained(patients=len(patients), steps=outcome.steps, loss=outcome.loss)
        total = MeanAccumulator(plan.built.updated)
        total.fold(update, weight_of(said, plan))
        server = apply_update(state.server, total.mean(), plan.aggregation)
        assert outcome.loss is not None  # nothing here is private
        state = State(server, memory.optimiser, (*state.losses, outcome.loss))
        yield state


def train_alone(
    plan: StudyPlan,
    initial: Model,
    patients: Patients,
    *,
    site: str,
    kept: Path,
    data: str,
    device: str = "cpu",
    progress: Callable[[float], None] = lambda _loss: None,
) -> tuple[Arrays, tuple[float, ...]]:
    """Train alone to the end, or go on with what a file holds of it.

    Args:
        plan, patients, site, device: see `rounds_alone`.
        initial: the tensors whose digest the plan holds.
        kept: the file; it stays when all is done, and is then only read.
        data: the digest of the patients' data.
        progress: is told of every round's mean loss, of those before a kill at once.

    Returns:
        The model, and the mean loss of each round.

    Raises:
        DataError: the file is of other training; and as `rounds_alone`.
        PlanError, NotFiniteError, RoundError, TrustError: as `rounds_alone`.
        StorageError: the file cannot be written.
    """
    recipe = recipe_of(plan.digest, site, data, sorted(patients))
    found = _read(kept, recipe)
    state = start = found or State(ServerState(dict(initial)), {})
    if found is None:
        _write(kept, recipe, start)  # where it cannot be, no round is lost
    for loss in start.losses:
        progress(loss)
    for state in rounds_alone(plan, start, patients, site=site, device=device):
        _write(kept, recipe, state)
        progress(state.losses[-1])
    return state.server.released(plan.aggregation), state.losses


def _write(path: Path, recipe: str, state: State) -> None:
    """Keep a state in place of the one before."""
    server = state.server
    parts = {
        "model": server.model,
        "average": server.average or {},
        "optimiser": state.optimiser,
    }
    put_aside(path, _Kept(recipe=recipe, losses=state.losses), parts)


def _read(path: Path, recipe: str) -> State | None:
    """What was kept of the same recipe, or None where nothing was."""
    found = take_up(path, _Kept, recipe, "training (plan, patients or their data differ)")
    if found is None:
        return None
    header, parts = found
    rounds = len(header.losses)
    server = ServerState(parts.get("model", {}), average=parts.get("average"), steps=rounds)
    return State(server, parts.get("optimiser", {}), header.losses)
