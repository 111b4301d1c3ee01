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
    """One server step with the mean of the sites' updates (same names and shapes as the model).

    Goes tensor by tensor, so that little more is held than the old state and the new one.
    """
    model: Model = {}
    momentum: Model = {}
    average: Model = {}
    for name, old in state.model.items():
        step = np.asarray(mean[name], np.float64)
        if rule.server_momentum:
            before = state.momentum[name] if state.momentum else np.zeros_like(step)
            step = momentum[name] = rule.server_momentum * before + step
        new = old.astype(np.float64) + rule.server_learning_rate * step
        model[name] = new.astype(old.dtype)
        if rule.weight_averaging:
            keep = rule.weight_averaging
            total = state.average[name] if state.average else np.zeros(old.shape, np.float64)
            average[name] = keep * total + (1 - keep) * model[name]
    return ServerState(model, momentum or None, average or None, state.steps + 1)
