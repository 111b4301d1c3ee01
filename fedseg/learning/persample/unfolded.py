"""What a convolution's kernel sees at each of its positions, written out; for few positions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd


def unfolded(x: Tensor, sides: Sequence[int], layer: _ConvNd, padding: Sequence[int]) -> Tensor:
    """Patches of an image, in the order of a weight's numbers.

    Args:
        x: (samples, channels, *spatial).
        sides: of the convolution's output.
        layer: gives kernel, stride and dilation.
        padding: zeros on each side of each axis.

    Returns:
        (samples, channels * kernel, positions).
    """
    x = functional.pad(x, [p for p in reversed(padding) for _ in range(2)])
    offsets = product(*(range(k) for k in layer.kernel_size))
    seen = [
        x[
            (
                slice(None), slice(None),
                *(
                    slice(at * d, at * d + (n - 1) * step + 1, step)
                    for at, d, n, step in zip(
                        offset, layer.dilation, sides, layer.stride, strict=True
                    )
                ),
            )
        ]
        for offset in offsets
    ]  # fmt: skip
    return torch.stack(seen, 2).reshape(len(x), -1, prod(sides))
