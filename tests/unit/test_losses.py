"""The loss of each patient by itself."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceCELoss

from fedseg.learning.losses import annotated_rows, dice_ce_per_patient


@pytest.mark.parametrize("sides", [(5, 4), (5, 4, 3)])
@pytest.mark.parametrize("labels", [1, 3])
def test_it_agrees_with_monai_on_each_patient(sides: tuple[int, ...], labels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 1 + labels, *sides, generator=generator)
    target = torch.randint(0, 1 + labels, (4, *sides), generator=generator)
    monai = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    expected = [monai(logits[i : i + 1], target[i : i + 1, None]) for i in range(4)]
    torch.testing.assert_close(dice_ce_per_patient(logits, target), torch.stack(expected))


def test_a_coin_toss_costs_half_a_dice_and_log_two() -> None:
    target = torch.tensor([[[0, 0, 1, 1]]])
    loss = dice_ce_per_patient(torch.zeros(1, 2, 1, 4), target)
    assert loss.item() == pytest.approx(0.5 + log(2), abs=1e-5)


def test_no_patient_sees_another() -> None:
    logits = torch.randn(3, 2, 4, 4, requires_grad=True)
    target = torch.randint(0, 2, (3, 4, 4))
    dice_ce_per_patient(logits, target)[1].backward()
    assert logits.grad is not None
    assert not logits.grad[0].any() and not logits.grad[2].any() and logits.grad[1].any()


def test_a_perfect_prediction_costs_nothing() -> None:
    target = torch.tensor([[[0, 1], [2, 0]]])
    logits = 50 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    assert dice_ce_per_patient(logits, target).item() == pytest.approx(0, abs=1e-4)


def _case(seed: int, labels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets and annotated labels of four patients, float64; each row has a True."""
    chance = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 1 + labels, 5, 4, 3, generator=chance, dtype=torch.float64)
    annotated = torch.rand(4, labels, generator=chance) < 0.5
    annotated[range(4), torch.randint(labels, (4,), generator=chance)] = True
    target = torch.randint(0, 1 + labels, (4, 5, 4, 3), generator=chance)
    there = torch.cat([torch.ones(4, 1, dtype=torch.bool), annotated], 1)
    for row, known in zip(target, there, strict=True):
        row[~known[row]] = 0
    return logits, target, annotated


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_the_marginal_loss_agrees_with_merged_classes_in_double(seed: int, labels: int) -> None:
    """The reference sums probabilities by a matrix, and gives MONAI fewer classes."""
    logits, target, annotated = _case(seed, labels)
    logits.requires_grad_()
    losses = dice_ce_per_patient(logits, target, annotated)
    (own,) = torch.autograd.grad(losses.sum(), logits)
    monai = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    expected = []
    for one, truth, known in zip(logits, target, annotated, strict=True):
        kept = [label for label in range(1, labels + 1) if known[label - 1]]
        merge = torch.zeros(1 + len(kept), 1 + labels, dtype=torch.float64)
        for label in range(1 + labels):
            merge[1 + kept.index(label) if label in kept else 0, label] = 1
        shares = torch.einsum("kc,cxyz->kxyz", merge, one.softmax(0))
        renamed = torch.zeros_like(truth)
        for new, label in enumerate(kept, start=1):
            renamed[truth == label] = new
        expected.append(monai(shares.log()[None], renamed[None, None]))
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=1e-12)
    (theirs,) = torch.autograd.grad(torch.stack(expected).sum(), logits)
    torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_annotated_gives_the_same_bits(dtype: torch.dtype) -> None:
    logits, target, _ = _case(1, 3)
    found = []
    for annotated in (None, torch.ones(4, 3, dtype=torch.bool)):
        leaf = logits.to(dtype).requires_grad_()
        losses = dice_ce_per_patient(leaf, target, annotated)
        found.append((losses, *torch.autograd.grad(losses.mean(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_not_annotated_is_neither_taught_nor_forbidden() -> None:
    """Moving probability between background and such a label costs nothing, in any voxel."""
    logits, target, _ = _case(2, 3)
    annotated = torch.tensor([[True, False, True]] * 4)
    target[target == 2] = 0
    shares = logits.softmax(1)
    moved = shares.clone()
    moved[:, 0], moved[:, 2] = (
        0.9 * (shares[:, 0] + shares[:, 2]),
        0.1 * (shares[:, 0] + shares[:, 2]),
    )
    torch.testing.assert_close(
        dice_ce_per_patient(shares.log(), target, annotated),
        dice_ce_per_patient(moved.log(), target, annotated),
    )
    assert not torch.allclose(
        dice_ce_per_patient(shares.log(), target), dice_ce_per_patient(moved.log(), target)
    )


def test_the_rows_of_a_mixed_batch_are_each_patients_own() -> None:
    logits, target, annotated = _case(3, 4)
    annotated[1] = True
    whole = dice_ce_per_patient(logits, target, annotated)
    alone = [dice_ce_per_patient(logits[i : i + 1], target[i : i + 1], annotated[i : i + 1])
             for i in range(4)]  # fmt: skip
    assert torch.equal(whole, torch.cat(alone))
    assert torch.equal(whole[1:2], dice_ce_per_patient(logits[1:2], target[1:2]))


def test_rows_are_in_the_order_of_the_labels_values() -> None:
    labels = {"tumour": 2, "liver": 1, "vessel": 3}
    rows = annotated_rows([("liver",), None, ("vessel", "tumour")], labels)
    assert rows is not None
    assert rows.tolist() == [[True, False, False], [True] * 3, [False, True, True]]
    assert annotated_rows([None, ("vessel", "liver", "tumour")], labels) is None
