"""The coordinator's step from one global model to the next.

FedAvg: the mean of the updates is added to the model (McMahan et al., AISTATS 2017); FedProx
aggregates the same way (Li et al., MLSys 2020), its proximal term works at the sites. Server
learning rate and momentum treat the mean as a pseudo-gradient (Reddi et al., ICLR 2021; Hsu et al.,
2019). Weight averaging keeps a bias-corrected exponential moving average of the models, which is
what is evaluated and released; sites go on training from the model itself. All of it is
post-processing: it reads no patient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.arrays import Arrays
from fedseg.plan import Aggregation

Model = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ServerState:
    """The global model and what the server's rule remembers.

    Attributes:
        model: what sites train from, in the plan's dtypes.
        momentum: running pseudo-gradient, float64; None before the first step or without momentum.
        average: running sum of the moving average, float64, not yet bias-corrected; None without.
        steps: closed training stages.
    """

    model: Model
    momentum: Model | None = None
    average: Model | None = None
    steps: int = 0

    def released(self, rule: Aggregation) -> Model:
        """The model that is evaluated and released: the average where the plan asks for one."""
        if self.average is None:
            return self.model
        correction = 1.0 - rule.weight_averaging**self.steps
        return {
            name: (total / correction).astype(self.model[name].dtype)
            for name, total in self.average.items()
        }


def apply_update(state: ServerState, mean: Arrays, rule: Aggregation) -> ServerState:
    """One server step with the mean of the sites' updates (same names and shapes as the model)."""
    momentum = None
    step = {name: np.asarray(value, np.float64) for name, value in mean.items()}
    if rule.server_momentum:
        before = state.momentum or {name: np.zeros_like(value) for name, value in step.items()}
        momentum = {name: rule.server_momentum * before[name] + step[name] for name in step}
        step = momentum
    model: Model = {}
    for name, old in state.model.items():
        new = old.astype(np.float64) + rule.server_learning_rate * step[name]
        model[name] = new.astype(old.dtype)
    average = None
    if rule.weight_averaging:
        keep = rule.weight_averaging
        sums = state.average or {name: np.zeros(a.shape, np.float64) for name, a in model.items()}
        average = {name: keep * sums[name] + (1 - keep) * model[name] for name in model}
    return ServerState(model, momentum, average, state.steps + 1)
