"""The clipped sum: bounded whatever comes, the same in every mode, and agreed on by Opacus."""

from __future__ import annotations

import gc
import warnings
from math import inf, isfinite, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import PATIENTS, alone, batch, layers, loss, unet
from torch import Tensor, nn

from fedseg.errors import PlanError
from fedseg.learning.persample.clip import STABILISER, shares
from fedseg.learning.persample.clipped import ClippedSum, clipped_sum, merge, zero_sum
from fedseg.learning.persample.gradients import Method, gradients, pieces, work_of
from fedseg.learning.persample.memory import choose, saved_bytes


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def norm_of(parts: dict[str, Tensor]) -> float:
    return float(sum(part.double().square().sum() for part in parts.values()) ** 0.5)  # type: ignore[arg-type]


def furthest(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert some.keys() == others.keys()
    return max(float((some[name] - others[name]).abs().max()) for name in others)


def clipped_by_hand(rows: dict[str, Tensor], bound: float) -> tuple[dict[str, Tensor], Tensor]:
    norms = torch.cat([part.reshape(len(part), -1) for part in rows.values()], 1).norm(dim=1)
    factors = (bound / norms).clamp(max=1)
    return {k: torch.einsum("p...,p->...", part, factors) for k, part in rows.items()}, norms


@pytest.mark.parametrize("samples", [None, 1, 2, 4])
@pytest.mark.parametrize("method", ["stored", "two-pass", "loop"])
def test_every_mode_and_micro_batch_gives_the_sum_by_hand(
    method: Method, samples: int | None
) -> None:
    network, shape = unet(3, "instance", 2)
    data = batch(network.double(), shape, torch.float64)
    rows = alone(network, data, PATIENTS)
    bound = float(clipped_by_hand(rows, 1.0)[1].median())
    expected, norms = clipped_by_hand(rows, bound)
    found = clipped_sum(
        network, loss, data, PATIENTS, bound, method=method, samples_at_once=samples
    )
    assert furthest(found.sum, expected) < 1e-12
    torch.testing.assert_close(found.norms, norms)
    assert found.patients.tolist() == [1, 4, 9] and found.remarks == ()


@pytest.mark.parametrize("kind", sorted(layers()))
@pytest.mark.filterwarnings("ignore:Using padding")
def test_two_passes_equal_the_stored_gradients_for_every_layer(kind: str) -> None:
    network, shape = layers()[kind]
    data = batch(network.double(), shape, torch.float64)
    stored = clipped_sum(network, loss, data, PATIENTS, 0.1)
    two = clipped_sum(network, loss, data, PATIENTS, 0.1, method="two-pass", samples_at_once=3)
    assert furthest(two.sum, stored.sum) < 1e-12
    torch.testing.assert_close(two.norms, stored.norms)


def test_two_passes_bound_the_dropout_that_they_add() -> None:
    network, shape = unet(2, "instance", 2, dropout=0.4)
    data = batch(network.double(), shape, torch.float64)
    for seed in range(5):
        torch.manual_seed(seed)
        one = clipped_sum(
            network, loss, data, torch.zeros(6, dtype=torch.long), 1e-3, method="two-pass"
        )
        assert norm_of(one.sum) <= 1e-3


@pytest.mark.parametrize("method", ["stored", "two-pass", "loop"])
def test_mixed_precision_does_not_loosen_the_bound(method: Method) -> None:
    """The sum is added up in the parameters' type, whatever type the network computes in."""
    network = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 1, 3))
    for seed in range(10):
        torch.manual_seed(seed)
        data = torch.randn(4, 1, 16, 16), torch.randn(4, 1, 12, 12)
        with torch.autocast("cpu", torch.bfloat16):
            found = clipped_sum(network, loss, data, torch.zeros(4).long(), 1e-2, method=method)
        assert float(found.norms[0]) > 1e-2 and norm_of(found.sum) <= 1e-2
        assert {part.dtype for part in found.sum.values()} == {torch.float32}


def test_two_passes_in_mixed_precision_equal_the_stored_gradients_and_leave_out_the_lost() -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.PReLU(), nn.Conv2d(8, 1, 3))
    data = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 4, 4)
    data[1][0] = nan  # of the first patient
    with torch.autocast("cpu", torch.bfloat16):
        stored = clipped_sum(network, loss, data, PATIENTS, 0.1)
        two = clipped_sum(network, loss, data, PATIENTS, 0.1, method="two-pass")
    assert two.norms.isfinite().sum() == stored.norms.isfinite().sum() == 2
    assert 0 < norm_of(two.sum) <= 0.2
    assert furthest(two.sum, stored.sum) < 1e-6


def test_all_patches_of_a_patient_are_averaged_before_the_one_clip() -> None:
    network, shape = unet(2, "group", 0)
    data = batch(network.double(), shape, torch.float64)
    one = torch.zeros(len(data[0]), dtype=torch.long)
    mean = {k: v[0] for k, v in alone(network, data, one).items()}
    assert furthest(clipped_sum(network, loss, data, one, 1e6).sum, mean) < 1e-12
    assert norm_of(clipped_sum(network, loss, data, one, 0.01).sum) == pytest.approx(0.01)


@given(
    scale=st.floats(1e-12, 1e12),
    bound=st.floats(1e-10, 1e10),
    wide=st.booleans(),
    seed=st.integers(0, 2**31),
    automatic=st.booleans(),
)
def test_no_patient_gives_more_than_the_bound_after_rounding(
    scale: float, bound: float, wide: bool, seed: int, automatic: bool
) -> None:
    network = nn.Sequential(nn.Linear(7, 5), nn.PReLU(5), nn.Linear(5, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    dtype = torch.float64 if wide else torch.float32
    network.to(dtype)
    x = torch.randn(3, 7, generator=generator).to(dtype)
    for method in ("stored", "two-pass", "loop"):
        found = clipped_sum(
            network, lambda out, t: (out * scale).sum(1), (x, x), torch.zeros(3).long(), bound,
            method=method, clipping="automatic" if automatic else "flat",
        )  # fmt: skip
        assert norm_of(found.sum) <= bound


@given(
    norms=st.lists(st.floats().map(abs), min_size=1),
    bound=st.floats(1e-20, 1e20),
)
def test_shares_bound_every_norm(norms: list[float], bound: float) -> None:
    for clipping in ("flat", "automatic"):
        found = shares(torch.tensor(norms, dtype=torch.float64), bound, clipping, torch.float32)
        for norm, share in zip(norms, found.float().tolist(), strict=True):
            assert 0 <= share < inf
            assert (norm * share <= bound) if isfinite(norm) else share == 0
            if clipping == "flat" and norm < bound * (1 - 1e-5):
                assert share == 1


def test_automatic_clipping_normalises() -> None:
    norms = torch.tensor([0.0, 0.01, 1.0, 99.99], dtype=torch.float64)
    found = shares(norms, 2.0, "automatic", torch.float64)
    assert found.tolist() == pytest.approx([2 / (n + STABILISER) for n in norms.tolist()])


@pytest.mark.parametrize("bound", [0.0, -1.0, nan, inf, 1e-30])
def test_a_bound_that_bounds_nothing_is_refused(bound: float) -> None:
    network, shape = layers()["linear"]
    with pytest.raises(ValueError, match="clip norm"):
        clipped_sum(network, loss, batch(network, shape, torch.float32), PATIENTS, bound)


@pytest.mark.parametrize("bad", [nan, inf, 1e38])
@pytest.mark.parametrize("method", ["stored", "two-pass", "loop"])
def test_a_patient_that_is_not_finite_adds_zero_and_harms_nobody(
    method: Method, bad: float
) -> None:
    network, shape = unet(2, "instance", 2)
    data = batch(network, shape, torch.float32)
    good = PATIENTS != 4
    expected = clipped_sum(network, loss, (data[0][good], data[1][good]), PATIENTS[good], 0.1)
    data[0][0] = bad  # one of patient 4's three samples
    found = clipped_sum(network, loss, data, PATIENTS, 0.1, method=method)
    if isfinite(bad) and bool(found.norms.isfinite().all()):
        return  # an instance norm may bear it
    assert not found.norms[1].isfinite() and found.norms[[0, 2]].isfinite().all()
    assert furthest(found.sum, expected.sum) < 1e-6


def test_the_network_is_as_before_also_after_a_failure() -> None:
    network, shape = unet(2, "instance", 2)
    data = batch(network, shape, torch.float32)
    with pytest.raises(ZeroDivisionError):
        clipped_sum(network, lambda out, t: 1 / 0, data, PATIENTS, 1.0)  # type: ignore[arg-type,return-value]
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(not m._forward_hooks and "forward" not in m.__dict__ for m in network.modules())


def test_what_has_no_rule_takes_the_loop_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x.reshape(-1, 4)).reshape(x.shape)
            return out

    network = Windows().double()
    data = batch(network, (2, 4), torch.float64)
    for method in ("stored", "two-pass"):
        found = clipped_sum(network, loss, data, PATIENTS, 0.1, method=method)
        assert len(found.remarks) == 1 and "one backward for each patient" in found.remarks[0]
        assert "inner" in found.remarks[0] and "inner" in caplog.text
        loop = clipped_sum(network, loss, data, PATIENTS, 0.1, method="loop")
        assert furthest(found.sum, loop.sum) == 0


def test_an_unknown_layer_says_that_it_runs_alone() -> None:
    network, shape = layers()["unknown"]
    data = batch(network, shape, torch.float32)
    (remark,) = clipped_sum(network, loss, data, PATIENTS, 1.0).remarks
    assert remark.startswith("1: no rule for Strange")


def test_a_loss_over_the_batch_is_refused() -> None:
    network, shape = layers()["linear"]
    data = batch(network, shape, torch.float32)
    with pytest.raises(ValueError, match="loss for each sample"):
        clipped_sum(network, lambda out, t: loss(out, t).mean(), data, PATIENTS, 1.0)


def test_sums_of_several_devices_add_up_and_share_no_patient() -> None:
    network, shape = unet(2, "group", 0)
    data = batch(network.double(), shape, torch.float64)
    whole = clipped_sum(network, loss, data, PATIENTS, 0.1)
    here = PATIENTS == 4
    parts = [
        clipped_sum(network, loss, (data[0][own], data[1][own]), PATIENTS[own], 0.1)
        for own in (here, ~here)
    ]
    merged = merge(parts)
    assert furthest(merged.sum, whole.sum) < 1e-12
    assert merged.patients.tolist() == whole.patients.tolist()
    torch.testing.assert_close(merged.norms, whole.norms)
    with pytest.raises(ValueError, match="two devices"):
        merge([whole, parts[0]])


def test_an_empty_draw_has_a_sum_of_zeros() -> None:
    network, _ = layers()["linear"]
    empty = zero_sum(network)
    assert isinstance(empty, ClippedSum) and len(empty.norms) == 0
    assert empty.sum.keys() == dict(network.named_parameters()).keys()
    assert not any(part.any() for part in empty.sum.values())


def test_an_estimate_keeps_nothing_of_what_it_looked_at() -> None:
    network, shape = unet(2, "instance", 2)
    data = batch(network, shape, torch.float32)

    def tensors() -> int:
        saved_bytes(network, loss, (data[0][:1], data[1][:1]))
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    tensors()
    assert tensors() == tensors()


def test_memory_chooses_the_mode_and_the_micro_batch() -> None:
    network, shape = unet(2, "instance", 2, channels=(16, 32, 64))
    data = batch(network, shape, torch.float32)
    one = data[0][:1], data[1][:1]
    gradient = sum(p.numel() * 4 for p in network.parameters())
    assert saved_bytes(network, loss, one) > 10 * data[0][:1].nbytes
    large = choose(network, loss, one, 10**9)
    assert large.method == "stored" and large.samples_at_once >= 6
    small = choose(network, loss, one, int(2.5 * gradient))
    assert small.method == "two-pass"
    with pytest.raises(PlanError, match="MiB"):
        choose(network, loss, one, gradient)
    work, _ = work_of(data, PATIENTS)
    for piece in pieces(work, 2, "two-pass"):  # whole patients, of 2, 3 and 1 samples
        assert piece.begins and piece.ends


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.filterwarnings("ignore")
def test_opacus_agrees(mode: str) -> None:
    from opacus.grad_sample import GradSampleModule

    network, shape = unet(2, "group", 0)
    network.double()
    data = batch(network, shape, torch.float64)
    found = gradients(network, loss, work_of(data, torch.arange(6))[0], "stored")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModule(
            network, loss_reduction="sum", strict=False, force_functorch=mode == "functorch"
        )
        loss(wrapped(data[0]), data[1]).sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad_sample, found[name], rtol=1e-9, atol=1e-13)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
def test_opacus_optimiser_works_on_our_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module import GradSampleHooks
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleHooksFastGradientClipping,
    )
    from opacus.optimizers import DPOptimizer

    from fedseg.learning.persample.opacus import REGISTERED, register_grad_samplers

    for hooks in (GradSampleHooks, GradSampleHooksFastGradientClipping):
        monkeypatch.setattr(hooks, "GRAD_SAMPLERS", dict(hooks.GRAD_SAMPLERS))
    network, shape = unet(3, "instance", 2)
    network.double()
    data = batch(network, shape, torch.float64)
    expected = clipped_sum(network, loss, data, torch.arange(6), 0.1)
    register_grad_samplers()
    assert all(kind in GradSampleHooks.GRAD_SAMPLERS for kind in REGISTERED)
    wrapped = GradSampleModule(network, loss_reduction="sum", strict=False)
    optimiser = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=1.0),
        noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=1, loss_reduction="sum",
    )  # fmt: skip
    loss(wrapped(data[0]), data[1]).sum().backward()
    optimiser.pre_step()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        # Opacus divides by norm + 1e-6
        torch.testing.assert_close(parameter.grad, expected.sum[name], rtol=1e-4, atol=1e-7)


def test_the_coarsest_type_of_a_network_says_how_much_rounds() -> None:
    network = nn.Sequential(nn.Linear(1, 1, bias=False).double(), nn.Linear(400, 400).bfloat16())
    over = 0
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(1, 400)

        def mixed(out: Tensor, target: Tensor) -> Tensor:
            return (out * target).sum(1).float()

        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = network

            def forward(self, x: Tensor) -> Tensor:
                first = self.parts[0](x[:, :1].double())
                return self.parts[1](x.bfloat16()) + first.bfloat16()

        found = clipped_sum(Mixed(), mixed, (x, x), torch.zeros(1).long(), 1.0)
        over += norm_of(found.sum) > 1.0
    assert over == 0


def test_a_layer_that_only_some_samples_pass_is_clipped_with_the_rest() -> None:
    """Cut into micro-batches, a parameter may have a gradient in a patient's first part alone."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.always(x)) if x[0, 0] > 0 else self.always(x)

    network = Sometimes().double()
    x = torch.randn(4, 3).double()
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    patients = torch.tensor([0, 0, 1, 1])
    stored, looped = (
        clipped_sum(network, loss, (x, x), patients, 0.1, method=method, samples_at_once=1)
        for method in ("stored", "loop")
    )
    assert furthest(stored.sum, looped.sum) < 1e-12
