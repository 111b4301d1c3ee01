"""Random changes of training patches, as the plan's `training.augmentation` says.

Each kind of change touches a patch with probability one half, so that unchanged images stay
frequent; flips do so along each axis. Rotation and scaling are one resampling about the centre, in
mm, from a patch that was cut with a margin: no empty corners. Intensities are changed channel by
channel, on the normalised scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, cos, radians, sin, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedseg.training import Augmentation

HALF = 0.5


def margin_of(
    patch: Sequence[int], spacing_mm: Sequence[float], settings: Augmentation
) -> tuple[int, ...]:
    """Voxels that rotation and scaling may need beyond each side of a patch.

    At most the patch itself: what a stronger change still misses becomes zero.
    """
    if settings.rotation_degrees == 0 and settings.scaling == 0:
        return (0,) * len(patch)
    half = [n * mm / 2 for n, mm in zip(patch, spacing_mm, strict=True)]
    turn = min(1.0, sqrt(len(patch) - 1) * sin(radians(min(settings.rotation_degrees, 90))))
    margins = []
    for n, mm, own in zip(patch, spacing_mm, half, strict=True):
        others = sqrt(sum(h * h for h in half) - own * own)
        reach = (1 + settings.scaling) * (own + turn * others)
        margins.append(min(ceil((reach - own) / mm), n))
    return tuple(margins)


def augment(
    images: Tensor,
    labels: Tensor,
    *,
    margin: Sequence[int],
    spacing_mm: Sequence[float],
    settings: Augmentation,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Change each patch of a batch by itself, and take the margin off.

    Args:
        images: (B, C, *size), float32, with size = patch + 2 * margin.
        labels: (B, *size), any integer type.
        margin: as from `margin_of`.
        spacing_mm: of each of the patch's axes.
        settings: what may change, and how much.
        rng: the only source of chance.

    Returns:
        images (B, C, *patch) float32 and labels (B, *patch) int64, on the same device.
    """
    placed = [
        _place(image, label, margin=margin, spacing_mm=spacing_mm, settings=settings, rng=rng)
        for image, label in zip(images, labels, strict=True)
    ]
    images = torch.stack([image for image, _ in placed])
    labels = torch.stack([label for _, label in placed]).long()
    return _change_intensities(images, settings, rng), labels


def rotation(degrees: Sequence[float]) -> NDArray[np.float64]:
    """Rotation matrix of one angle (2, 2), or of three about X, then Y, then Z (3, 3)."""
    if len(degrees) == 1:
        return _plane(2, 0, 1, degrees[0])
    x, y, z = degrees
    return _plane(3, 0, 1, z) @ _plane(3, 0, 2, y) @ _plane(3, 1, 2, x)


def resample(
    image: Tensor,
    label: Tensor,
    margin: Sequence[int],
    matrix: NDArray[np.float64],
) -> tuple[Tensor, Tensor]:
    """Draw the inner patch at `matrix @ (voxel - centre)`: linear for images, nearest for labels.

    Args:
        image: (C, *size).
        label: (*size).
        margin: taken off each side.
        matrix: (D, D), in voxels.
    """
    size = image.shape[1:]
    patch = [n - 2 * m for n, m in zip(size, margin, strict=True)]
    theta = matrix * np.array(patch) / np.array(size)[:, None]
    affine = np.concatenate([theta[::-1, ::-1], np.zeros((len(size), 1))], 1)
    grid = functional.affine_grid(
        torch.tensor(affine[None], dtype=torch.float32, device=image.device),
        [1, len(image), *patch],
        align_corners=False,
    )
    moved = functional.grid_sample(image[None], grid, align_corners=False)
    nearest = functional.grid_sample(
        label[None, None].float(), grid, mode="nearest", align_corners=False
    )
    return moved[0], nearest[0, 0].to(label.dtype)


def _place(
    image: Tensor,
    label: Tensor,
    *,
    margin: Sequence[int],
    spacing_mm: Sequence[float],
    settings: Augmentation,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Rotate, scale and flip one patch."""
    dimensions = label.ndim
    if (settings.rotation_degrees or settings.scaling) and rng.random() < HALF:
        limit = settings.rotation_degrees
        turn = rotation(rng.uniform(-limit, limit, 1 if dimensions == 2 else 3).tolist())
        scale = rng.uniform(1 - settings.scaling, 1 + settings.scaling)
        mm = np.array(spacing_mm)
        image, label = resample(image, label, margin, scale * turn * mm / mm[:, None])
    else:
        inner = [slice(m, n - m) for m, n in zip(margin, label.shape, strict=True)]
        image, label = image[(slice(None), *inner)], label[tuple(inner)]
    axes = [axis for axis in settings.flip_axes if rng.random() < HALF]
    return image.flip([1 + axis for axis in axes]), label.flip(axes)


def _change_intensities(images: Tensor, settings: Augmentation, rng: np.random.Generator) -> Tensor:
    """Gamma, contrast, brightness and noise, each where the plan has it."""
    voxels = tuple(range(2, images.ndim))

    def draw(low: float, high: float, neutral: float) -> Tensor:
        shape = (*images.shape[:2], *(1 for _ in voxels))
        values = np.where(rng.random(shape) < HALF, rng.uniform(low, high, shape), neutral)
        return torch.tensor(values, dtype=images.dtype, device=images.device)

    if settings.gamma:
        power = draw(1 - settings.gamma, 1 + settings.gamma, 1.0)
        low, high = images.amin(voxels, keepdim=True), images.amax(voxels, keepdim=True)
        spread = (high - low).clamp_min(1e-6)
        images = ((images - low) / spread).pow(power) * spread + low
    if settings.contrast:
        factor = draw(1 - settings.contrast, 1 + settings.contrast, 1.0)
        mean = images.mean(voxels, keepdim=True)
        images = (images - mean) * factor + mean
    if settings.brightness:
        images = images + draw(-settings.brightness, settings.brightness, 0.0)
    if settings.noise:
        generator = torch.Generator(images.device).manual_seed(int(rng.integers(2**63)))
        normal = torch.empty_like(images).normal_(generator=generator)
        images = images + normal * draw(0.0, settings.noise, 0.0)
    return images


def _plane(dimensions: int, first: int, second: int, degrees: float) -> NDArray[np.float64]:
    """A rotation in the plane of two axes."""
    matrix = np.eye(dimensions)
    c, s = cos(radians(degrees)), sin(radians(degrees))
    matrix[first, first] = matrix[second, second] = c
    matrix[first, second], matrix[second, first] = -s, s
    return matrix
