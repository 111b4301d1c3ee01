"""Deferred weights: the same sums, bounded after rounding, and nothing of who is not finite."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from small_networks import loss
from torch import Tensor, nn
from torch.nn import functional

from fedseg.learning.persample import deferred
from fedseg.learning.persample.clip import shares
from fedseg.learning.persample.clipped import clipped_sum
from fedseg.learning.persample.gradients import gradients, work_of
from fedseg.learning.persample.unfolded import unfolded

Pair = tuple[int, int]
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
    monkeypatch.setattr(deferred, "TYPES", (torch.float32, torch.float64))  # to compare exactly


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
def test_patients_of_several_samples_are_averaged_first(kind: str) -> None:
    network, (x, target) = work(kind, torch.float64)
    data, patients = (x[:4], target[:4]), torch.tensor([7, 7, 3, 3])
    assert _deferred(network, data, patients) == ["0.weight"]
    bound = 0.9 * float(clipped_sum(network, loss, data, patients, 1.0, method="loop").norms.max())
    found, expected = (
        clipped_sum(network, loss, data, patients, bound, method=method)
        for method in ("stored", "loop")
    )
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=0)
    for name, part in expected.sum.items():
        torch.testing.assert_close(found.sum[name], part, rtol=1e-9, atol=1e-14)


def test_patients_of_unequally_many_samples_are_not_deferred() -> None:
    network, data = work("2d", torch.float64)
    assert _deferred(network, data, torch.tensor([0, 0, 0, 1, 1])) == []


@given(
    sides=st.tuples(*[st.integers(1, 4)] * 2), kernel=st.tuples(*[st.integers(1, 3)] * 2),
    stride=st.tuples(*[st.integers(1, 3)] * 2), dilation=st.tuples(*[st.integers(1, 2)] * 2),
    padding=st.tuples(*[st.integers(0, 2)] * 2), each=st.integers(1, 3),
    by_pixels=st.booleans(),
)  # fmt: skip
def test_pixels_and_patches_give_torchs_own_unfolding(
    sides: Pair, kernel: Pair, stride: Pair, dilation: Pair, padding: Pair, each: int,
    by_pixels: bool,
) -> None:  # fmt: skip
    reach = zip(sides, kernel, dilation, padding, strict=True)
    assume(all(n + 2 * p > d * (k - 1) for n, k, d, p in reach))
    layer = nn.Conv2d(2, 3, kernel, stride, padding, dilation).double()
    x = torch.randn(2 * each, 2, *sides, dtype=torch.float64)
    output = layer(x).detach()
    seen = functional.unfold(x, kernel, dilation, padding, stride)
    torch.testing.assert_close(unfolded(x, output.shape[2:], layer, padding), seen)
    columns = seen.view(2, each, seen.shape[1], -1).transpose(1, 2).flatten(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferred, "_products", lambda *_: (0, 1) if by_pixels else (1, 0))
        found = deferred._patches(x, output, layer, each)
    torch.testing.assert_close(found, columns.mT @ columns, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_bound_holds_after_rounding(kind: str) -> None:
    network, (x, target) = work(kind, torch.float32)
    for scale in (1e-6, 1.0, 1e6):
        one = (x[:1] * scale, target[:1])
        for bound in (1e-3, 1.0):
            found = clipped_sum(network, loss, one, torch.zeros(1).long(), bound)
            norm = sum(part.double().square().sum() for part in found.sum.values()) ** 0.5
            assert norm <= bound


@pytest.mark.parametrize("kind", ["2d stride", "3d", "3d transposed"])
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-8, 1e8), each=st.integers(1, 2))
def test_samples_that_cancel_are_bounded_after_rounding(
    kind: str, seed: int, scale: float, each: int
) -> None:
    """Two samples of one patient, one nearly the other's opposite: a norm of rounding alone."""
    layer, shape = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(1, 3, *shape, generator=generator) * scale).expand(each, 3, *shape)
    gradient = torch.randn(1, *layer(x[:1]).shape[1:], generator=generator)
    signs = torch.tensor([1.0, -1.0][:each]).view(-1, *[1] * (len(shape) + 1))
    one = deferred.Deferred("w", layer, x, gradient * signs, each)  # type: ignore[arg-type]
    norms = one.squares().sqrt()
    bound = 0.5 * float(norms)
    share = shares(norms, bound, "flat", torch.float32)
    assert share[0] > 0
    assert float(one.weighted(share).double().norm()) <= bound


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


def test_a_float64_gradient_that_cancels_is_not_taken_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its norm is 1e-9 of its terms; their products in float64 would say that it is nothing."""
    monkeypatch.undo()
    monkeypatch.setattr(deferred, "STORED_NS", inf)
    layer = nn.Conv2d(64, 8, 1, bias=False).double()
    for seed in range(5):
        torch.manual_seed(seed)
        x, target = (torch.randn(1, n, 1, 1).double().repeat(1, 1, 1, 2) * 1e4 for n in (64, 8))
        target[..., 1] *= -(1 + 1e-9)
        data = (x, target)

        def product(outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs * targets).flatten(1).sum(1)

        found = clipped_sum(layer, product, data, torch.zeros(1).long(), 1e-3)
        assert float(found.norms[0]) > 1e-3
        assert float(found.sum["weight"].norm()) <= 1e-3


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


def _deferred(
    network: nn.Module, data: tuple[Tensor, Tensor], patients: Tensor | None = None
) -> list[str]:
    """The names of what was put off."""
    later: list[deferred.Deferred] = []
    piece, _ = work_of(data, torch.arange(len(data[0])) if patients is None else patients)
    gradients(network, loss, piece, "stored", later)
    return [each.name for each in later]
