"""The loss of each patient by itself."""

from __future__ import annotations

from math import log

import pytest
import torch
from monai.losses import DiceCELoss

from fedseg.learning.losses import dice_ce_per_patient


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
