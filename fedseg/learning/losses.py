"""The training loss: soft Dice plus cross-entropy, for each patient on its own.

Nothing couples the patients of a batch, so that a per-patient gradient exists.

Where a hospital draws only some of the labels, its background says nothing of the others: what the
network gives to them counts as given to the background (the marginal loss of Fang and Yan, IEEE TMI
2020, and Shi et al., Medical Image Analysis 2021). They are then neither taught nor forbidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

SMOOTH = 1e-5


def dice_ce_per_patient(logits: Tensor, target: Tensor, annotated: Tensor | None = None) -> Tensor:
    """Soft Dice loss, mean over the foreground labels, plus cross-entropy, mean over the voxels.

    Equals MONAI's `DiceCELoss(include_background=False, softmax=True, to_onehot_y=True)` on each
    element by itself (Milletari et al., 3DV 2016; Isensee et al., Nat Methods 2021); where labels
    are not annotated, on the softmax in which their shares were added to the background's, with
    the Dice of the annotated labels alone.

    Args:
        logits: (B, 1 + labels, *patch), any float type; computed in float32, doubles as they are.
        target: (B, *patch), int64 in 0..labels; no label that its patient is not annotated with.
        annotated: (B, labels), bool, at least one True in each row; None is all True, which gives
            the same bits.

    Returns:
        (B,), as computed, at least 0. A label that is absent from a patch costs up to 1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    voxels = tuple(range(2, logits.ndim))
    log_shares = logits.log_softmax(1)
    if annotated is not None:
        log_shares = _merged(log_shares, annotated)
    cross_entropy = functional.nll_loss(log_shares, target, reduction="none").flatten(1).mean(1)
    shares = log_shares.exp()[:, 1:]
    truth = torch.stack([target == label for label in range(1, logits.shape[1])], 1)
    truth = truth.to(logits.dtype)
    overlap = (shares * truth).sum(voxels)
    total = shares.sum(voxels) + truth.sum(voxels)
    dice = 1 - (2 * overlap + SMOOTH) / (total + SMOOTH)
    if annotated is None:
        return dice.mean(1) + cross_entropy
    return (dice * annotated).sum(1) / annotated.sum(1) + cross_entropy


def annotated_rows(
    patients: Sequence[Sequence[str] | None], labels: Mapping[str, int]
) -> Tensor | None:
    """Who is annotated with what, as the loss takes it; None where everybody is with everything.

    Args:
        patients: names of the labels of each; None is all of them.
        labels: name -> value 1, 2, 3, ..., of the plan.

    Returns:
        (patients, labels), bool, columns by value.
    """
    names = sorted(labels, key=labels.__getitem__)
    rows = torch.tensor([[p is None or name in p for name in names] for p in patients])
    return None if bool(rows.all()) else rows


def _merged(log_shares: Tensor, annotated: Tensor) -> Tensor:
    """Log shares with those of labels that are not annotated in the background's.

    The emptied channels hold -inf, and pass no gradient on.
    """
    shape = (*annotated.shape, *(1 for _ in range(2, log_shares.ndim)))
    known = annotated.view(shape)
    nothing = float("-inf")
    others = log_shares[:, 1:]
    merged = torch.cat([log_shares[:, :1], others.masked_fill(known, nothing)], 1)
    background = merged.logsumexp(1, keepdim=True)
    return torch.cat([background, others.masked_fill(~known, nothing)], 1)
