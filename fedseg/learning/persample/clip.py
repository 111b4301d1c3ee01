"""How much of each patient's gradient goes into the sum.

Flat: the share min(1, C / norm), so that no patient gives more than norm C (Abadi et al., CCS
2016). Automatic: C / (norm + 0.01), which makes all patients count alike and C a mere learning
rate (Bu et al., NeurIPS 2023). Both bounds hold after rounding: C is first lowered by 64 units in
the last place, more than multiplying and adding may add. A gradient that is not finite gives zero.
"""

from __future__ import annotations

from math import isfinite
from typing import Literal

import torch
from torch import Tensor

Clipping = Literal["flat", "automatic"]
STABILISER = 0.01
ULPS = 64
SMALLEST = 1e-20  # far above float32's subnormals, whose rounding is absolute


def shares(norms: Tensor, clip_norm: float, clipping: Clipping, dtype: torch.dtype) -> Tensor:
    """The factor of each patient's gradient.

    Args:
        norms: (patients,), float64, of the gradients in `dtype`.
        clip_norm: C, at least 1e-20.
        clipping: which rule.
        dtype: in which the factors will be used.

    Returns:
        (patients,), float64: factor * norm is at most C, also once the product is rounded.
    """
    check_clip_norm(clip_norm)
    bound = clip_norm * (1 - ULPS * torch.finfo(dtype).eps)
    found = (bound / norms).clamp(max=1) if clipping == "flat" else bound / (norms + STABILISER)
    tiny = torch.finfo(dtype).tiny  # below it a share rounds by more than units in the last place
    return torch.where(norms.isfinite() & (found >= tiny), found, 0)


def check_clip_norm(clip_norm: float) -> None:
    """Refuse a bound that bounds nothing.

    Raises:
        ValueError: not a finite number of at least 1e-20.
    """
    if not isfinite(clip_norm) or clip_norm < SMALLEST:
        raise ValueError(f"expected a finite clip norm of at least {SMALLEST}, came {clip_norm}")
