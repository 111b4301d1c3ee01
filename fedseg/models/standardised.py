"""Convolutions whose weights have mean zero and variance one in each output channel.

Weight standardisation (Qiao et al., arXiv 1903.10520) steadies training with group norm, and with
noise (De et al., arXiv 2204.13650). Stored, trained and sent is the raw weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-5


def standardise(weight: Tensor, eps: float = EPS) -> Tensor:
    """Standardise a weight (out, in, *kernel) over all but its first axis."""
    variance, mean = torch.var_mean(
        weight, dim=tuple(range(1, weight.ndim)), correction=0, keepdim=True
    )
    return (weight - mean) * torch.rsqrt(variance + eps)


class StandardisedConv2d(nn.Conv2d):
    """nn.Conv2d with a standardised weight."""

    eps = EPS

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H', W')."""
        output: Tensor = self._conv_forward(input, standardise(self.weight, self.eps), self.bias)
        return output


class StandardisedConv3d(nn.Conv3d):
    """nn.Conv3d with a standardised weight."""

    eps = EPS

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in, D, H, W) to (B, out, D', H', W')."""
        output: Tensor = self._conv_forward(input, standardise(self.weight, self.eps), self.bias)
        return output
