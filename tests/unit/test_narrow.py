"""Narrow convolutions and one-slope PReLUs: torch's own gradients, from other kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedseg.learning.persample.folded import prelu
from fedseg.learning.persample.narrow import FEW_CHANNELS, forward_of, narrow

LAYERS = {
    "1d": (nn.Conv1d(5, 3, 3, padding=1), (9,)),
    "2d": (nn.Conv2d(2, 8, (3, 5), padding=(2, 0)), (7, 8)),
    "2d dilation": (nn.Conv2d(4, 2, 3, dilation=2, padding=3, bias=False), (9, 6)),
    "3d": (nn.Conv3d(3, 3, 3, padding=1), (4, 5, 3)),
    "3d pointwise": (nn.Conv3d(16, 4, 1), (3, 2, 4)),
}
OTHERS = [
    nn.Conv2d(3, FEW_CHANNELS + 1, 3),
    nn.Conv2d(3, 3, 3, stride=2),
    nn.Conv2d(4, 4, 3, groups=2),
    nn.Conv2d(3, 3, 3, padding="same"),
    nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(3, 3, 1, padding=1),
    nn.ConvTranspose2d(3, 3, 3),
    nn.Linear(3, 3),
]


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of a sum that weighs every number differently."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_output_and_input_gradient_are_torchs(kind: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    layer = layer.double()
    assert narrow(layer)
    x = torch.randn(2, layer.in_channels, *shape, dtype=torch.float64, requires_grad=True)
    found, expected = forward_of(layer)(x), layer(x)
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradients(found, x), gradients(expected, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", OTHERS, ids=str)
def test_others_are_left_alone(layer: nn.Module) -> None:
    assert not narrow(layer)


def test_autocast_keeps_the_layers_own_forward() -> None:
    layer = nn.Conv2d(2, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert forward_of(layer)(torch.randn(1, 2, 5, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5, 2.0])
def test_a_slope_for_each_sample_has_torchs_gradients(slope: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    x[0, 0, 0] = 0.0
    x.requires_grad_()
    layer = nn.PReLU().double()
    slopes = torch.full((3, 1), slope, dtype=torch.float64, requires_grad=True)
    found = prelu(layer, x, {"weight": slopes})
    expected = functional.prelu(x.reshape(1, 3, -1), slopes.flatten()).view(x.shape)
    assert torch.equal(found, expected)
    torch.testing.assert_close(
        gradients(found, x, slopes), gradients(expected, x, slopes), rtol=1e-12, atol=1e-12
    )
