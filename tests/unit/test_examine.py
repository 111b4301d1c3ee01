"""Networks and losses that mix patients are refused by what they do, with a name and a remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_networks import PATIENTS, batch, layers, loss, unet
from torch import Tensor, nn

from fedseg.errors import PlanError
from fedseg.learning.losses import dice_ce_per_patient
from fedseg.learning.persample.clipped import clipped_sum
from fedseg.learning.persample.examine import examine


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Mixing(nn.Module):
    """No batch norm by name."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class MixingPart(nn.Module):
    """Mixes in a forward of its own, not in a part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out / out.abs().amax()


class Elsewhere(nn.Module):
    """Uses a part's weight outside the part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.inner(x), self.inner.weight.T)


class Gated(nn.Module):
    """What its inner part does shows once the gate is open."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gate = inner, nn.Conv2d(2, 2, 1)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.gate(self.inner(x))
        return out


def zero_head(parts: nn.Module) -> nn.Module:
    head = nn.Conv2d(2, 2, 1)
    nn.init.zeros_(head.weight)
    return nn.Sequential(parts, head)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_our_networks_and_loss_pass(dimensions: int, norm: str) -> None:
    network, shape = unet(dimensions, norm, 2, dropout=0.2)
    inputs, targets = batch(network, shape, torch.float32)
    before = torch.random.get_rng_state()
    found = examine(network, dice_ce_per_patient, (inputs, targets.argmax(1)), PATIENTS)
    assert found.method == "stored" and found.remarks == ()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "kind",
    [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), Mixing()],
)
def test_a_layer_that_mixes_patients_is_named_with_a_remedy(kind: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Sequential(nn.ReLU(), kind), nn.Conv2d(4, 2, 1))
    data = batch(network, (2, 8, 8), torch.float32)
    with pytest.raises(PlanError, match=rf"'1\.1'.*{type(kind).__name__}.*instance or group norm"):
        examine(network, loss, data, PATIENTS)


def test_mixing_outside_every_layer_is_found() -> None:
    network = MixingPart()
    with pytest.raises(PlanError, match="'itself', a MixingPart"):
        examine(network, loss, batch(network, (2, 8, 8), torch.float32), PATIENTS)


def batch_dice(outputs: Tensor, targets: Tensor) -> Tensor:
    overlap = (outputs.sigmoid() * targets).sum()
    return 1 - overlap / (outputs.sigmoid() + targets.abs()).sum() + outputs.flatten(1).mean(1)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (batch_dice, "depends on the others"),
        (lambda out, t: loss(out, t).mean(), "loss for each sample"),
    ],
)
def test_a_loss_over_the_batch_is_refused(
    bad: Callable[[Tensor, Tensor], Tensor], words: str
) -> None:
    network, shape = unet(2, "instance", 0)
    with pytest.raises(PlanError, match=words):
        examine(network, bad, batch(network, shape, torch.float32), PATIENTS)


def test_a_weight_used_outside_its_layer_takes_the_loop_by_name() -> None:
    network = Elsewhere()
    data = batch(network, (4,), torch.float32)
    found = examine(network, loss, data, PATIENTS)
    assert found.method == "loop" and "inner.weight" in found.remarks[0]
    clipped_sum(network, loss, data, PATIENTS, 1.0, method=found.method)


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("kind", sorted(layers()))
def test_every_layer_that_we_know_is_batched(kind: str) -> None:
    network, shape = layers()[kind]
    found = examine(network, loss, batch(network, shape, torch.float32), PATIENTS)
    assert found.method == "stored"
    special = kind in ("unknown", "bare parameters", "embedding", "relu in place")
    assert bool(found.remarks) == special


def test_a_layer_that_works_in_place_is_mended_and_named() -> None:
    network, shape = layers()["relu in place"]
    found = examine(network, loss, batch(network, shape, torch.float32), PATIENTS)
    assert found.remarks == ("1.0: ReLU works in place; it is run out of place",)
    assert network.get_submodule("1.0").inplace is True


def test_one_patient_is_no_examination() -> None:
    network, shape = layers()["linear"]
    with pytest.raises(ValueError, match="two patients"):
        examine(network, loss, batch(network, shape, torch.float32), torch.zeros(6).long())


def test_a_buffer_that_remembers_patients_is_refused_and_put_back() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            with torch.no_grad():
                self.seen.mul_(0.9).add_(y.mean((0, 2, 3)))
            return y

    network, x = Remembers(), torch.randn(4, 1, 8, 8)
    with pytest.raises(PlanError, match="buffer 'seen'"):
        examine(network, lambda out, _: out.flatten(1).square().mean(1), (x, x), torch.arange(4))
    assert not network.seen.any()


def test_mixing_behind_weights_that_begin_at_zero_is_found() -> None:
    network = zero_head(Gated(MixingPart()))
    with pytest.raises(PlanError, match="mixes"):
        examine(network, loss, batch(network, (2, 6, 6), torch.float32), PATIENTS)


def test_a_weight_used_outside_its_layer_is_found_behind_a_head_that_begins_at_zero() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.inner.weight)

    network = zero_head(Outside())
    before = {name: p.clone() for name, p in network.named_parameters()}
    found = examine(network, loss, batch(network, (2, 6, 6), torch.float32), PATIENTS)
    assert found.method == "loop" and "inner.weight" in found.remarks[0]
    assert all(torch.equal(before[name], p) for name, p in network.named_parameters())
