"""The coordinator's step from one global model to the next.

FedAvg adds the mean of the updates to the model (McMahan et al., AISTATS 2017); FedProx, FedBN,
FedPer and Ditto do the same here, what is their own works at the sites. FedAvgM, FedAdam, FedYogi
and FedAdagrad treat the mean as a pseudo-gradient (Hsu et al., 2019; Reddi et al., ICLR 2021,
algorithm 2, without bias correction and with v = 0 at the start). SCAFFOLD keeps a control variate
(Karimireddy et al., ICML 2020, option II), which follows from the mean of the updates, so that no
site sends one. Weight averaging keeps a bias-corrected exponential moving average of the models,
which is what is evaluated and released; sites go on training from the model itself. All of it is
post-processing: it reads no patient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.arrays import Arrays
from fedseg.strategy import Aggregation

Model = dict[str, NDArray[Any]]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class ServerState:
    """The global model and what the server's rule remembers.

    Attributes:
        model: what sites train from, in the plan's dtypes.
        momentum: running pseudo-gradient, float64; None before the first step or without momentum.
        average: running sum of the moving average, float64, not yet bias-corrected; None without.
        second: running second moment of the pseudo-gradient, float64; None without.
        control: SCAFFOLD's control variate, float64; None before the first step or without.
        steps: closed training stages.
    """

    model: Model
    momentum: Model | None = None
    average: Model | None = None
    second: Model | None = None
    control: Model | None = None
    steps: int = 0

    def released(self, rule: Aggregation) -> Model:
        """The model that is evaluated and released: the average where the plan asks for one."""
        if self.average is None:
            return self.model
        correction = 1.0 - rule.weight_averaging**self.steps
        averaged = {
            name: (total / correction).astype(self.model[name].dtype)
            for name, total in self.average.items()
        }
        return self.model | averaged


@dataclass(frozen=True)
class Presence:
    """What SCAFFOLD's server has to know of a round besides its mean update.

    Attributes:
        share: weight of the sites that answered over that of all that enlisted, in (0, 1].
        summed_rate: the round's learning rates, summed over its steps.
    """

    share: float
    summed_rate: float


def apply_update(
    state: ServerState, mean: Arrays, rule: Aggregation, presence: Presence | None = None
) -> ServerState:
    """One server step with the mean of the sites' updates.

    Goes tensor by tensor, so that little more is held than the old state and the new one.

    Args:
        mean: by name; tensors of the model that it lacks (frozen or personal) stay as they are.
        presence: for scaffold, which needs it.
    """
    model = dict(state.model)
    momentum: Model = {}
    average: Model = {}
    second: Model = {}
    control: Model = {}
    for name in mean:
        old, step = state.model[name], np.asarray(mean[name], np.float64)
        if rule.strategy == "scaffold":
            control[name] = _control(_kept(state.control, name, step), step, presence)
        if rule.server_momentum:
            share = 1 - rule.server_momentum if rule.adaptive else 1.0
            before = _kept(state.momentum, name, step)
            step = momentum[name] = rule.server_momentum * before + share * step
        if rule.adaptive:
            pseudo = np.asarray(mean[name], np.float64)
            second[name] = _second_moment(_kept(state.second, name, step), pseudo, rule)
            step = step / (np.sqrt(second[name]) + rule.server_tau)
        new = old.astype(np.float64) + rule.server_learning_rate * step
        model[name] = new.astype(old.dtype)
        if rule.weight_averaging:
            keep = rule.weight_averaging
            total = _kept(state.average, name, step)
            average[name] = keep * total + (1 - keep) * model[name]
    return ServerState(
        model=model,
        momentum=momentum or None,
        average=average or None,
        second=second or None,
        control=control or None,
        steps=state.steps + 1,
    )


def _second_moment(before: Values, step: Values, rule: Aggregation) -> Values:
    """V of Reddi et al., algorithm 2."""
    square, beta = step**2, rule.server_beta2
    if rule.strategy == "fedadagrad":
        return before + square
    if rule.strategy == "fedyogi":
        return before - (1 - beta) * square * np.sign(before - square)
    return beta * before + (1 - beta) * square


def _control(before: Values, step: Values, presence: Presence | None) -> Values:
    """C + share * mean(c_i' - c_i), where option II makes c_i' - c_i = -c - update / rates."""
    if presence is None:
        raise ValueError("scaffold needs to know who was present in the round")
    kept = (1 - presence.share) * before
    return np.asarray(kept - presence.share / presence.summed_rate * step)


def _kept(part: Model | None, name: str, like: Values) -> Values:
    """What the state remembers of one tensor; zeros before the first step."""
    return np.zeros_like(like) if part is None else part[name]
