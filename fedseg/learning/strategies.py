"""What a strategy asks of one site: a round of training, and what is remembered until the next.

FedBN and FedPer put the site's own tensors in place of the shared ones before they train. SCAFFOLD
adds the server's control variate less the site's own to every gradient, and takes the new own one
from how far the round went (option II). Ditto trains a second model, pulled towards the round's.
All that is remembered stays at the site.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedseg.arrays import Arrays
from fedseg.learning.local import RoundOutcome, train_round
from fedseg.learning.sampling import Patients
from fedseg.models.zoo import load_tensors, state_tensors
from fedseg.plan import StudyPlan
from fedseg.rates import summed_rate

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Memory:
    """What a site remembers of a study; every part is empty where nothing asks for it.

    Attributes:
        optimiser: moments of the shared model's optimiser.
        personal: the site's own tensors, by the model's names (FedBN, FedPer).
        control: SCAFFOLD's own control variate.
        own: Ditto's second model, whole.
        own_optimiser: moments of the second model's optimiser.
    """

    optimiser: Tensors = field(default_factory=dict)
    personal: Tensors = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)
    own: Tensors = field(default_factory=dict)
    own_optimiser: Tensors = field(default_factory=dict)


def train_by_strategy(
    network: nn.Module,
    patients: Patients,
    plan: StudyPlan,
    *,
    round_: int,
    site: str,
    model: Arrays,
    control: Arrays,
    memory: Memory,
) -> tuple[RoundOutcome, Tensors, Memory]:
    """Train one round as the plan's strategy says.

    Args:
        network: of the plan, frozen as it says; what it holds is overwritten.
        round_: from 1.
        site: its name, for the seeds.
        model: the round's shared model.
        control: the server's control variate; empty but for scaffold.
        memory: of the last round at this site.

    Returns:
        What the round gave, the update (trained less shared, of the plan's updated tensors), and
        what is to be remembered.

    Raises:
        DataError, NotFiniteError, RoundError: see `train_round`.
    """
    load_tensors(network, begun_from(model, memory))
    shift = {
        name: np.subtract(values, memory.control.get(name, np.zeros_like(values)))
        for name, values in control.items()
    }
    outcome = train_round(
        network,
        patients,
        plan,
        round_=round_,
        site=site,
        optimiser_state=memory.optimiser or None,
        anchor=model,
        shift=shift,
    )
    update, personal = what_changed(network, plan, model)
    own_control = {
        name: (-update[name] / summed_rate(plan, round_) - values).astype(values.dtype)
        for name, values in shift.items()
    }
    own, own_optimiser = memory.own, memory.own_optimiser
    if plan.aggregation.strategy == "ditto":
        own, own_optimiser = _own_model(network, patients, plan, round_, site, model, memory)
    kept = Memory(outcome.optimiser_state, personal, own_control, own, own_optimiser)
    return outcome, update, kept


def begun_from(model: Arrays, memory: Memory) -> Tensors:
    """The shared model with the site's own tensors in place."""
    return {**model, **memory.personal}


def used_here(model: Arrays, memory: Memory) -> Tensors:
    """The model that this site uses: Ditto's own, or the shared one with its own tensors."""
    return memory.own or begun_from(model, memory)


def what_changed(network: nn.Module, plan: StudyPlan, model: Arrays) -> tuple[Tensors, Tensors]:
    """After training: the update that leaves, and the tensors that stay at the site."""
    trained = state_tensors(network)
    names = (spec.name for spec in plan.built.updated)
    update = {name: np.subtract(trained[name], model[name]) for name in names}
    return update, {name: trained[name] for name in plan.built.personal}


def _own_model(
    network: nn.Module,
    patients: Patients,
    plan: StudyPlan,
    round_: int,
    site: str,
    model: Arrays,
    memory: Memory,
) -> tuple[Tensors, Tensors]:
    """Ditto's second model after this round: FedProx from where it was, towards the shared one."""
    pulled = {"strategy": "fedprox", "proximal_mu": plan.aggregation.ditto_lambda}
    aggregation = plan.aggregation.model_copy(update=pulled)
    load_tensors(network, memory.own or model)
    outcome = train_round(
        network,
        patients,
        plan.model_copy(update={"aggregation": aggregation}),
        round_=round_,
        site=site,
        optimiser_state=memory.own_optimiser or None,
        anchor=model,
    )
    return state_tensors(network), outcome.optimiser_state
