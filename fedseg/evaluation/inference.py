"""A network's mask of one prepared case, by sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from fedseg.task import Task

if TYPE_CHECKING:
    from fedseg.imaging.transforms import PreparedCase

_Reading = Callable[[Tensor], tuple[Tensor, ...]]
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
    (mask,) = _windowed(network, case, task, overlap, _most_likely)
    return np.ascontiguousarray(mask.cpu().numpy())


def predict_with_confidence(
    network: nn.Module, case: PreparedCase, task: Task, overlap: float
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The mask of `predict_mask`, and how sure the network is of each voxel's label.

    Returns:
        The mask, and the softmax of the most likely label, float32 (X, Y, Z), in (0, 1].
    """
    mask, confidence = _windowed(network, case, task, overlap, _most_likely_and_how)
    return (
        np.ascontiguousarray(mask.cpu().numpy()),
        np.ascontiguousarray(confidence.cpu().numpy()),
    )


def _windowed(
    network: nn.Module, case: PreparedCase, task: Task, overlap: float, reading: _Reading
) -> tuple[Tensor, ...]:
    """What is read off the blended logits of a case, each (X, Y, Z)."""
    image = torch.tensor(case.image, device=next(network.parameters()).device)
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            if task.dimensions == 3:
                whole = reading(_logits(network, image[None], task, overlap))
                return tuple(part[0] for part in whole)
            slices = torch.split(image.movedim(-1, 0), SLICES_AT_ONCE)
            parts = [reading(_logits(network, part, task, overlap)) for part in slices]
            return tuple(torch.cat(same).movedim(0, -1) for same in zip(*parts, strict=True))
    finally:
        network.train(training)


def _logits(network: nn.Module, images: Tensor, task: Task, overlap: float) -> Tensor:
    """Blended logits (B, 1 + labels, *spatial) of images (B, C, *spatial)."""
    found = sliding_window_inference(
        images, task.patch_size, WINDOWS_AT_ONCE, network, overlap=overlap, mode="gaussian"
    )
    return cast(Tensor, found)


def _most_likely(logits: Tensor) -> tuple[Tensor, ...]:
    """Labels (B, *spatial), uint8."""
    return (logits.argmax(1).to(torch.uint8),)


def _most_likely_and_how(logits: Tensor) -> tuple[Tensor, ...]:
    """Labels as `_most_likely` gives them, and their softmax, both (B, *spatial)."""
    return (*_most_likely(logits), logits.softmax(1).amax(1))
