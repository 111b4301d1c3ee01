"""The training loss: soft Dice plus cross-entropy, for each patient on its own.

Nothing couples the patients of a batch, so that a per-patient gradient exists.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SMOOTH = 1e-5


def dice_ce_per_patient(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss, mean over the foreground labels, plus cross-entropy, mean over the voxels.

    Equals MONAI's `DiceCELoss(include_background=False, softmax=True, to_onehot_y=True)` on each
    element by itself (Milletari et al., 3DV 2016; Isensee et al., Nat Methods 2021).

    Args:
        logits: (B, 1 + labels, *patch), any float type; computed in float32.
        target: (B, *patch), int64 in 0..labels.

    Returns:
        (B,), float32, at least 0. A label that is absent from a patch costs up to 1.
    """
    logits = logits.float()
    voxels = tuple(range(2, logits.ndim))
    log_shares = logits.log_softmax(1)
    cross_entropy = functional.nll_loss(log_shares, target, reduction="none").flatten(1).mean(1)
    shares = log_shares.exp()[:, 1:]
    truth = torch.stack([target == label for label in range(1, logits.shape[1])], 1).float()
    overlap = (shares * truth).sum(voxels)
    total = shares.sum(voxels) + truth.sum(voxels)
    dice = 1 - (2 * overlap + SMOOTH) / (total + SMOOTH)
    return dice.mean(1) + cross_entropy
