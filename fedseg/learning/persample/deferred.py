"""Large weights at few positions: a patient's norm from the factors, the clipped sum afterwards.

At the bottom of a U-Net a convolution has a large weight and few positions. A patient's gradient is
there a product G^T X of two small factors, G (positions, out) and X (positions, in x kernel), and
writing one for each patient takes longer than computing it. Its norm needs the factors' products
alone: |G^T X|^2 = sum(G G^T * X X^T) (Li et al., ICLR 2022). Once all shares are known, one plain
backward gives the weighted sum of the batch (Bu et al., ICML 2023). X X^T is a sum over the kernel
of shifted products of pixels, axis by axis; strides that leave few of these unfold X instead.
A patient with several samples has the positions of all of them.

The bound: the norm is computed in float64 from the very factors that go into the sum, and the most
that adding their products in any order can round by is added to it. It holds after rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fedseg.learning.persample.rules import Patients, convolution
from fedseg.learning.persample.unfolded import unfolded

KINDS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

TYPES = (torch.float32,)  # a norm from products loses half of the digits of float64

# Measured on one core of an AMD EPYC: what deferring costs beside what writing, squaring, weighing
# and adding up each patient's gradient does. They decide about time, never about results.
CALLS_NS = 300_000
PRODUCT_NS = 1 / 15
STORED_NS = 2.5


@dataclass(frozen=True)
class Deferred:
    """One convolution's weight, its gradients not computed yet.

    Args:
        name: the weight's.
        layer: the convolution.
        x: its input.
        gradient: at its output.
        each: samples of every patient, side by side.
    """

    name: str
    layer: _ConvNd
    x: Tensor
    gradient: Tensor
    each: int = 1

    def squares(self) -> Tensor:
        """Squared norms (patients,), float64, of the gradients as they may be rounded."""
        x, gradient = _factors(self.layer, self.x, self.gradient)
        first = _inner(gradient.double(), self.each)
        second = _patches(x.double(), gradient, self.layer, self.each)
        exact = (first * second).sum((1, 2)).clamp(min=0).sqrt()
        most = (_diagonal(first) * _diagonal(second)).clamp(min=0).sqrt().sum(1)
        rounding = (first.shape[1] + 8) * torch.finfo(self.gradient.dtype).eps
        return (exact + rounding * most).square()

    def weighted(self, shares: Tensor) -> Tensor:
        """The sum of the patients' gradients (*weight), each times its share.

        Those with a share of 0 take no part: theirs may not be finite.
        """
        shares = shares.repeat_interleave(self.each)
        x, gradient, kept = self.x, self.gradient, shares > 0
        if not bool(kept.any()):
            return torch.zeros_like(self.layer.weight).detach()
        if not bool(kept.all()):
            x, gradient = x[kept], gradient[kept]
        factors = shares[kept].to(gradient.dtype).view(-1, *(1,) * (gradient.ndim - 1))
        whole = [slice(0, len(x))]
        return convolution(self.layer, x, gradient * factors, whole, ("weight",))["weight"][0]


def deferrable(layer: nn.Module, x: Tensor, gradient: Tensor, patients: Patients) -> bool:
    """Whether deferring a convolution's weight is exact, and worth it.

    Patients with unequally many samples are not deferred, nor is what is not float32.
    """
    each = len(x) // len(patients)
    if type(layer) not in KINDS or gradient.device.type != "cpu":
        return False
    if any(p.stop - p.start != each for p in patients):
        return False
    assert isinstance(layer, _ConvNd)
    if x.dtype not in TYPES:
        return False
    plain = layer.groups == 1 and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    if not plain or not x.dtype == gradient.dtype == layer.weight.dtype or x.ndim < 3:
        return False
    inputs, outputs = _factors(layer, x, gradient)
    positions = each * outputs[0, 0].numel()
    products = min(_products(inputs, outputs, layer, each)) + positions**2 * outputs.shape[1]
    stored = STORED_NS * len(patients) * layer.weight.numel()
    return CALLS_NS + PRODUCT_NS * len(patients) * products < stored


def _factors(layer: _ConvNd, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of the convolution whose weight it is, transposed ones turned round."""
    return (gradient, x) if isinstance(layer, _ConvTransposeNd) else (x, gradient)


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2)


def _inner(columns: Tensor, each: int) -> Tensor:
    """Products (patients, each * n, each * n) of columns (samples, numbers, ...) with n places."""
    samples, numbers = columns.shape[:2]
    flat = columns.reshape(samples // each, each, numbers, -1).transpose(1, 2).flatten(2)
    return flat.mT @ flat


def _products(inputs: Tensor, outputs: Tensor, layer: _ConvNd, each: int) -> tuple[int, int]:
    """Multiplications that a patient's products of patches take: by pixels, and unfolded."""
    pixels, positions = each * inputs[0, 0].numel(), each * outputs[0, 0].numel()
    channels = inputs.shape[1]
    return pixels**2 * channels, positions**2 * channels * prod(layer.kernel_size)


def _patches(x: Tensor, outputs: Tensor, layer: _ConvNd, each: int) -> Tensor:
    """Products of the patches that a convolution sees, over all of a patient's positions."""
    sides = tuple(outputs.shape[2:])
    assert not isinstance(layer.padding, str)
    by_pixels, by_patches = _products(x, outputs, layer, each)
    if by_patches < by_pixels:
        return _inner(unfolded(x, sides, layer, layer.padding), each)
    found = _inner(x, each).view(-1, each, *x.shape[2:], each, *x.shape[2:])
    for axis, (size, kernel, padding, dilation, stride) in enumerate(
        zip(sides, layer.kernel_size, layer.padding, layer.dilation, layer.stride, strict=True), 2
    ):
        axes = axis, axis + 1 + len(sides)
        found = _along(found, axes, size, kernel, padding, dilation, stride)
    return found.view(len(found), each * prod(sides), each * prod(sides))


def _along(
    pixels: Tensor, axes: tuple[int, int], size: int, kernel: int, padding: int, dilation: int,
    stride: int,
) -> Tensor:  # fmt: skip
    """Sum products of pixels over one axis of the kernel."""
    margins = [0] * (2 * pixels.ndim)
    for axis in axes:
        margins[2 * (pixels.ndim - 1 - axis)] = margins[2 * (pixels.ndim - 1 - axis) + 1] = padding
    pixels = functional.pad(pixels, margins)
    found: Tensor | None = None
    for at in range(kernel):
        where: list[slice] = [slice(None)] * pixels.ndim
        for axis in axes:
            where[axis] = slice(at * dilation, at * dilation + (size - 1) * stride + 1, stride)
        part = pixels[tuple(where)]
        found = part.clone() if found is None else found.add_(part)
    assert found is not None
    return found.contiguous()
