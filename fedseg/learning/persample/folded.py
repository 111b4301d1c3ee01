"""Instance norm, group norm and PReLU with a weight for each sample, at no cost.

These layers treat channels alone. With the batch folded into the channels, (S, C, ...) becoming
(1, S * C, ...), they take a weight for each sample and channel, and the plain backward gives the
gradient of each: the same arithmetic, and no second look at the activations.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

Weights = dict[str, Tensor]
Folded = Callable[[nn.Module, Tensor, Weights], Tensor]


def instance_norm(layer: nn.Module, x: Tensor, weights: Weights) -> Tensor:
    """Instance norm without running statistics."""
    assert isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    weight, bias = _flat(weights)
    out = functional.instance_norm(_fold(x), weight=weight, bias=bias, eps=layer.eps)
    return out.view(x.shape)


def group_norm(layer: nn.Module, x: Tensor, weights: Weights) -> Tensor:
    """Group norm: each sample has its groups."""
    assert isinstance(layer, nn.GroupNorm)
    weight, bias = _flat(weights)
    out = functional.group_norm(_fold(x), len(x) * layer.num_groups, weight, bias, layer.eps)
    return out.view(x.shape)


def prelu(layer: nn.Module, x: Tensor, weights: Weights) -> Tensor:
    """PReLU with one weight, or one a channel."""
    assert isinstance(layer, nn.PReLU)
    weight, _ = _flat(weights)
    assert weight is not None
    folded = _fold(x) if layer.num_parameters > 1 else x.reshape(1, len(x), -1)
    return functional.prelu(folded, weight).view(x.shape)


FOLDED: dict[type[nn.Module], Folded] = {
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), instance_norm),
    nn.GroupNorm: group_norm,
    nn.PReLU: prelu,
}
"""By exact type: a subclass may compute something else."""


def _fold(x: Tensor) -> Tensor:
    """Samples become channels."""
    return x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])


def _flat(weights: Weights) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of every sample, one after the other."""
    weight, bias = weights.get("weight"), weights.get("bias")
    return (
        None if weight is None else weight.reshape(-1),
        None if bias is None else bias.reshape(-1),
    )
