"""Gradients of a batch's patients are autograd's of each alone, for every layer and network."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from small_networks import PATIENTS, alone, batch, distance, layers, loss, unet
from torch import nn

from fedseg.learning.persample.clipped import clipped_sum
from fedseg.learning.persample.gradients import Method, gradients, work_of
from fedseg.learning.persample.rules import UnsupportedLayerError
from fedseg.learning.persample.watch import remarks_on

pytestmark = pytest.mark.filterwarnings("ignore:Using padding")
KINDS = sorted(layers())
UNETS = [(d, norm, units) for d in (2, 3) for norm in ("instance", "group") for units in (0, 2)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layers_gradients_are_autograds_in_float64(kind: str) -> None:
    network, shape = layers()[kind]
    check_float64(network.double(), shape)


@pytest.mark.parametrize(("dimensions", "norm", "units"), UNETS)
def test_our_networks_gradients_are_autograds_in_float64(
    dimensions: int, norm: str, units: int
) -> None:
    network, shape = unet(dimensions, norm, units)
    assert remarks_on(network) == ()
    check_float64(network.double(), shape)


def check_float64(network: nn.Module, shape: tuple[int, ...]) -> None:
    data = batch(network, shape, torch.float64)
    trained = [p.requires_grad for p in network.parameters()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    work, names = work_of(data, PATIENTS)
    assert names.tolist() == [1, 4, 9]
    found = gradients(network, loss, work, "stored")
    assert distance(found, alone(network, data, PATIENTS)) < 1e-9
    assert trained == [p.requires_grad for p in network.parameters()]
    assert all(torch.equal(state[k], v) for k, v in network.state_dict().items())
    assert all(not m._forward_hooks and "forward" not in m.__dict__ for m in network.modules())


@pytest.mark.parametrize(("dimensions", "norm", "units"), UNETS)
def test_float32_errs_at_most_twice_as_much_as_autograd(
    dimensions: int, norm: str, units: int
) -> None:
    network, shape = unet(dimensions, norm, units)
    check_float32(network, shape)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "embedding"])
def test_float32_errs_at_most_twice_as_much_as_autograd_in_a_layer(kind: str) -> None:
    network, shape = layers()[kind]
    check_float32(network, shape)


def check_float32(network: nn.Module, shape: tuple[int, ...]) -> None:
    data = batch(network, shape, torch.float32)
    exact = alone(deepcopy(network).double(), (data[0].double(), data[1].double()), PATIENTS)
    found = gradients(network, loss, work_of(data, PATIENTS)[0], "stored")
    own = distance(found, exact)
    assert own <= 2 * distance(alone(network, data, PATIENTS), exact) + 1e-8


@pytest.mark.parametrize("layout", [torch.channels_last, torch.channels_last_3d])
def test_channels_last_gives_the_same(layout: torch.memory_format) -> None:
    network, shape = unet(2 if layout == torch.channels_last else 3, "group", 2)
    network = network.double()
    data = batch(network, shape, torch.float64)
    expected = alone(network, data, PATIENTS)
    network.to(memory_format=layout)  # type: ignore[call-overload]
    turned = (data[0].to(memory_format=layout), data[1])
    assert (
        distance(gradients(network, loss, work_of(turned, PATIENTS)[0], "stored"), expected) < 1e-9
    )


def test_channels_last_gives_the_same_where_few_positions_are_left() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3)).double()
    data = batch(network, (2, 8, 8), torch.float64)
    each = torch.arange(len(data[0]))  # one sample a patient
    expected = alone(network, data, each)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    turned = (data[0].to(memory_format=torch.channels_last), data[1])
    assert distance(gradients(network, loss, work_of(turned, each)[0], "stored"), expected) < 1e-9


@pytest.mark.parametrize("method", ["stored", "two-pass"])
def test_an_output_padded_by_a_stride_or_more_takes_the_loop(method: Method) -> None:
    """Torch's kernels refuse the convolution from such an output back to its input."""
    layer = nn.ConvTranspose1d(8, 4, 3, dilation=2, output_padding=1)
    data = torch.randn(6, 8, 7), torch.randn(6, 4, 12)
    expected = clipped_sum(layer, loss, data, PATIENTS, 1.0, method="loop")
    found = clipped_sum(layer, loss, data, PATIENTS, 1.0, method=method)
    assert "output" in found.remarks[0]
    torch.testing.assert_close(found.sum, expected.sum)


def test_mixed_precision_gives_parameters_types_and_autograds_error() -> None:
    network, shape = unet(2, "instance", 2)
    data = batch(network, shape, torch.float32)
    exact = alone(network, data, PATIENTS)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(network, loss, work_of(data, PATIENTS)[0], "stored")
        plain = alone(network, data, PATIENTS)
    assert all(rows.dtype == torch.float32 for rows in found.values())
    assert distance(found, exact) <= 2 * distance(plain, exact)


def test_frozen_parameters_get_nothing_and_stay_frozen() -> None:
    network, shape = unet(2, "instance", 2)
    network.double()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".N." in name or ".A." in name)
    data = batch(network, shape, torch.float64)
    found = gradients(network, loss, work_of(data, PATIENTS)[0], "stored")
    expected = alone(network, data, PATIENTS)
    assert found.keys() == expected.keys() and all(".N." in k or ".A." in k for k in found)
    assert distance(found, expected) < 1e-9


def test_dropout_draws_for_each_sample_and_the_gradient_is_of_that_draw() -> None:
    network, shape = unet(2, "instance", 2, dropout=0.3)
    network.double()
    data = batch(network, shape, torch.float64)
    work, _ = work_of(data, torch.zeros(len(data[0]), dtype=torch.long))
    torch.manual_seed(5)
    found = gradients(network, loss, work, "stored")
    torch.manual_seed(5)
    expected = alone(network, data, torch.zeros(len(data[0]), dtype=torch.long))
    assert distance(found, expected) < 1e-9


def test_a_batch_folded_into_another_axis_is_not_guessed() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(x.reshape(-1, 4)).reshape(x.shape)
            return out

    network = Windows()
    data = batch(network, (2, 4), torch.float32)
    with pytest.raises(UnsupportedLayerError, match="inner"):
        gradients(network, loss, work_of(data, PATIENTS)[0], "stored")
    assert all(p.requires_grad for p in network.parameters())


def test_an_input_changed_in_place_is_found_and_named() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            middle = self.first(x) * 2
            out: torch.Tensor = self.second(middle)
            middle.add_(1)
            return out

    network = Overwriting()
    data = batch(network, (2, 4, 4), torch.float32)
    with pytest.raises(UnsupportedLayerError, match=r"second: .*in place"):
        gradients(network, loss, work_of(data, PATIENTS)[0], "stored")


def test_an_in_place_function_after_the_first_layer_is_followed() -> None:
    class Rectified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.second(torch.relu_(self.first(x)))
            return out

    network = Rectified().double()
    data = batch(network, (2, 4, 4), torch.float64)
    found = gradients(network, loss, work_of(data, PATIENTS)[0], "stored")
    assert distance(found, alone(network, data, PATIENTS)) < 1e-9
