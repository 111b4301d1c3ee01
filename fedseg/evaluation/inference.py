"""A network's mask of one prepared case, by sliding windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from fedseg.plan import Task

if TYPE_CHECKING:
    from fedseg.imaging.transforms import PreparedCase

WINDOWS_AT_ONCE = 4
SLICES_AT_ONCE = 16


def predict_mask(
    network: nn.Module, case: PreparedCase, task: Task, overlap: float
) -> NDArray[np.uint8]:
    """The most likely label of every voxel on the prepared grid.

    Windows of the plan's patch size overlap and are blended with a Gaussian; an image smaller than
    the patch is padded with zeros, as in training. A 2-D task goes slice by slice along the third
    axis. Runs on the network's device, in float32; the network's mode is put back.

    Args:
        network: maps (B, C, *patch) to logits (B, 1 + labels, *patch).
        case: image (C, X, Y, Z).
        task: its patch size is the window.
        overlap: of neighbouring windows along each axis, in [0, 1).

    Returns:
        uint8 (X, Y, Z), values 0..labels.
    """
    device = next(network.parameters()).device
    image = torch.tensor(case.image, device=device)
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            if task.dimensions == 3:
                mask = _most_likely(network, image[None], task, overlap)[0]
            else:
                slices = torch.split(image.movedim(-1, 0), SLICES_AT_ONCE)
                masks = [_most_likely(network, part, task, overlap) for part in slices]
                mask = torch.cat(masks).movedim(0, -1)
    finally:
        network.train(training)
    return np.ascontiguousarray(mask.cpu().numpy())


def _most_likely(network: nn.Module, images: Tensor, task: Task, overlap: float) -> Tensor:
    """Labels (B, *spatial), uint8, of images (B, C, *spatial)."""
    logits = sliding_window_inference(
        images, task.patch_size, WINDOWS_AT_ONCE, network, overlap=overlap, mode="gaussian"
    )
    return cast(Tensor, logits).argmax(1).to(torch.uint8)
