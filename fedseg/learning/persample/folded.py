"""Instance norm, group norm and PReLU with a weight for each sample, at no cost.

These layers treat channels alone. With the batch folded into the channels, (S, C, ...) becoming
(1, S * C, ...), they take a weight for each sample and channel, and the plain backward gives the
gradient of each: the same arithmetic, and no second look at the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
    if layer.num_parameters > 1:
        return functional.prelu(_fold(x), weight).view(x.shape)
    if x.device.type != "cpu":
        return functional.prelu(x.reshape(1, len(x), -1), weight).view(x.shape)
    return _OneSlope.apply(x, weight)  # type: ignore[no-any-return,no-untyped-call]


class _OneSlope(torch.autograd.Function):
    """PReLU with one weight: torch's own backward takes ten times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slopes: Tensor) -> Tensor:
        """Slopes (samples,) are equal: copies of the one weight."""
        ctx.save_for_backward(x, slopes)
        return functional.prelu(x, slopes[:1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the input, and of each sample's slope."""
        x, slopes = ctx.saved_tensors
        own = x.clamp(max=0).mul_(gradient).flatten(1).sum(1)
        found = torch.ops.aten.leaky_relu_backward(gradient, x, float(slopes[0]), False)
        return found, own


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
