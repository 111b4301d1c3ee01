"""Convolutions to few channels, such as a network's head: their input's gradient, made faster.

Torch's CPU kernels take 4 to 20 times as long for the input's gradient of such a layer as for its
output, a tenth or more of a small network's step. The same numbers are a plain convolution of the
output's gradient with the kernel turned round (Dumoulin and Visin, 2016), which is fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FEW_CHANNELS = 8
_CONVOLVE = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


def narrow(layer: nn.Module) -> bool:
    """Whether a layer is such a convolution: stride 1, one group, zeros around, on a CPU."""
    if type(layer) not in KINDS:
        return False
    assert isinstance(layer, _ConvNd)
    plain = set(layer.stride) == {1} and layer.groups == 1 and layer.padding_mode == "zeros"
    if not plain or isinstance(layer.padding, str) or layer.weight.device.type != "cpu":
        return False
    return layer.out_channels <= FEW_CHANNELS and all(m >= 0 for m in _margins(layer))


def forward_of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A narrow layer's forward: the same output; gradients flow to its input alone."""
    assert isinstance(layer, _ConvNd)
    usual: Callable[[Tensor], Tensor] = layer.forward

    def forward(input: Tensor) -> Tensor:
        if input.ndim != layer.weight.ndim or torch.is_autocast_enabled("cpu"):
            return usual(input)
        found: Tensor = _Narrow.apply(input, layer)  # type: ignore[no-untyped-call]
        return found

    return forward


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _ConvNd) -> Tensor:
        """The layer's output."""
        ctx.layer = layer
        return _CONVOLVE[x.ndim](
            x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The input's gradient."""
        layer = ctx.layer
        turned = layer.weight.flip(list(range(2, gradient.ndim))).transpose(0, 1)
        found = _CONVOLVE[gradient.ndim](gradient, turned, None, 1, _margins(layer), layer.dilation)
        return found, None


def _margins(layer: _ConvNd) -> tuple[int, ...]:
    """The padding that brings the gradient back to the input's shape."""
    assert not isinstance(layer.padding, str)
    sides = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
    return tuple(d * (k - 1) - p for k, p, d in sides)
