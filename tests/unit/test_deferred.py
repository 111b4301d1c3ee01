"""Deferred weights: the same sums, bounded after rounding, and nothing of who is not finite."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from small_networks import loss
from torch import Tensor, nn

from fedseg.learning.persample import deferred
from fedseg.learning.persample.clipped import clipped_sum
from fedseg.learning.persample.gradients import gradients, work_of

KINDS = {
    "1d": (nn.Conv1d(3, 4, 5, padding=2, stride=3), (17,)),
    "2d": (nn.Conv2d(3, 4, 3, padding=1), (5, 6)),
    "2d stride": (nn.Conv2d(3, 4, (3, 2), padding=(0, 1), stride=(2, 1)), (7, 5)),
    "2d dilation": (nn.Conv2d(3, 4, 3, padding=2, dilation=2, stride=2), (7, 6)),
    "3d": (nn.Conv3d(3, 4, 3, padding=1, stride=(1, 2, 1)), (3, 4, 2)),
    "2d transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (4, 3)),
    "3d transposed": (nn.ConvTranspose3d(3, 4, (2, 3, 3), stride=(1, 2, 1)), (2, 2, 2)),
}


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(deferred, "STORED_NS", inf)


def work(kind: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A layer among others, and five samples."""
    layer, shape = KINDS[kind]
    network = nn.Sequential(layer, nn.Tanh()).to(dtype)
    x = torch.randn(5, 3, *shape, dtype=dtype)
    return network, (x, torch.randn_like(network(x)).detach())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_it_is_the_clipped_sum_of_each_alone(kind: str) -> None:
    network, data = work(kind, torch.float64)
    assert _deferred(network, data) == ["0.weight"]
    found = clipped_sum(network, loss, data, torch.arange(5), 0.01)
    expected = clipped_sum(network, loss, data, torch.arange(5), 0.01, method="loop")
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=0)
    for name, part in expected.sum.items():
        torch.testing.assert_close(found.sum[name], part, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_bound_holds_after_rounding(kind: str) -> None:
    network, (x, target) = work(kind, torch.float32)
    for scale in (1e-6, 1.0, 1e6):
        one = (x[:1] * scale, target[:1])
        for bound in (1e-3, 1.0):
            found = clipped_sum(network, loss, one, torch.zeros(1).long(), bound)
            norm = sum(part.double().square().sum() for part in found.sum.values()) ** 0.5
            assert norm <= bound


def test_what_cancels_is_bounded_by_what_it_is_made_of() -> None:
    """A sum that is nearly nothing rounds by units of its terms, not of itself."""
    layer = nn.Conv2d(1, 1, 1, bias=False)
    x = torch.full((1, 1, 8, 8), 1e4)
    gradient = torch.randn(1, 1, 8, 8)
    gradient -= gradient.mean()
    one = deferred.Deferred("w", layer, x, gradient)
    made = one.weighted(torch.ones(1, dtype=torch.float64)).double().norm() ** 2
    assert made <= one.squares()[0]


def test_who_is_not_finite_adds_nothing_and_takes_nobody_along() -> None:
    network, (x, target) = work("2d", torch.float64)
    bad = x.clone()
    bad[2] = nan
    found = clipped_sum(network, loss, (bad, target), torch.arange(5), 0.01)
    rest = [0, 1, 3, 4]
    expected = clipped_sum(network, loss, (x[rest], target[rest]), torch.arange(4), 0.01)
    for name, part in expected.sum.items():
        torch.testing.assert_close(found.sum[name], part)
    none = clipped_sum(network, loss, (x * nan, target), torch.arange(5), 0.01)
    assert all(not bool(part.any()) for part in none.sum.values())


def test_a_weight_that_is_used_twice_or_cut_in_pieces_is_not_deferred() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(layer, nn.Tanh(), layer).double()
    data = torch.randn(4, 3, 4, 4).double(), torch.randn(4, 3, 4, 4).double()
    assert _deferred(network, data) == []
    patients = torch.tensor([0, 0, 1, 1])
    once = nn.Sequential(layer).double()
    found = clipped_sum(once, loss, data, patients, 0.01, samples_at_once=1)
    expected = clipped_sum(once, loss, data, patients, 0.01, method="loop")
    for name, part in expected.sum.items():
        torch.testing.assert_close(found.sum[name], part, rtol=1e-9, atol=1e-14)


def test_only_what_is_cheaper_is_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    patients = [slice(0, 1), slice(1, 2)]

    def chosen(channels: int, side: int) -> bool:
        layer = nn.Conv2d(channels, channels, 3, padding=1)
        x = torch.empty(2, channels, side, side)
        return deferred.deferrable(layer, x, x, patients)

    assert chosen(256, 4)
    assert not chosen(16, 4)  # a small weight
    assert not chosen(256, 64)  # many positions


def _deferred(network: nn.Module, data: tuple[Tensor, Tensor]) -> list[str]:
    """The names of what was put off."""
    later: list[deferred.Deferred] = []
    piece, _ = work_of(data, torch.arange(len(data[0])))
    gradients(network, loss, piece, "stored", later)
    return [each.name for each in later]
