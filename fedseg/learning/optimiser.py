"""A site's optimiser, and its state as named arrays.

State is kept at the site, never sent. Restored, it continues bit for bit as if it had not stopped.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedseg.arrays import Arrays
from fedseg.errors import RoundError
from fedseg.training import Optimiser


def build_optimiser(network: nn.Module, settings: Optimiser) -> torch.optim.Optimizer:
    """The plan's optimiser over the parameters that are trained, in the network's order.

    Torch's fused kernels: the same arithmetic in a quarter of the time.
    """
    parameters = list(trained(network).values())
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(
        parameters, lr=rate, weight_decay=decay, momentum=settings.momentum, fused=True
    )


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def optimiser_arrays(
    network: nn.Module, optimiser: torch.optim.Optimizer
) -> dict[str, NDArray[np.generic]]:
    """The optimiser's state, copied, as "moment/parameter" -> array, such as "exp_avg/conv.weight".

    SGD without momentum has none.
    """
    return {
        f"{moment}/{name}": value.detach().cpu().numpy().copy()
        for name, parameter in trained(network).items()
        for moment, value in optimiser.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimiser(network: nn.Module, optimiser: torch.optim.Optimizer, arrays: Arrays) -> None:
    """Put back what `optimiser_arrays` gave.

    Raises:
        RoundError: the state belongs to another network or optimiser.
    """
    names = list(trained(network))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, array in arrays.items():
        moment, _, name = key.partition("/")
        fits = name in names and array.shape in ((), tuple(trained(network)[name].shape))
        if not fits or moment not in _MOMENTS[type(optimiser)]:
            raise RoundError(
                "the optimiser's stored state does not fit the plan's network or optimiser: "
                "remove the stored state of this study at this site and start the round again"
            )
        state.setdefault(names.index(name), {})[moment] = torch.tensor(array)
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


_MOMENTS: dict[type, frozenset[str]] = {
    torch.optim.AdamW: frozenset({"step", "exp_avg", "exp_avg_sq"}),
    torch.optim.SGD: frozenset({"momentum_buffer"}),
}
