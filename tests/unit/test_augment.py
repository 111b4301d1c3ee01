"""Random changes of patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedseg.learning.augment import augment, margin_of, resample, rotation
from fedseg.training import Augmentation


def run(
    images: torch.Tensor, labels: torch.Tensor, seed: int = 0, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    dimensions = labels.ndim - 1
    plan = Augmentation(**settings)
    patch = list(labels.shape[1:])
    margin = (0,) * dimensions
    if plan.rotation_degrees or plan.scaling:
        margin = tuple(n // 4 for n in patch)
    return augment(
        images,
        labels,
        margin=margin,
        spacing_mm=(1.0,) * dimensions,
        settings=plan,
        rng=np.random.default_rng(seed),
    )


def batch(*sides: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 2, *sides, generator=generator)
    return images, torch.randint(0, 3, (4, *sides), generator=generator, dtype=torch.uint8)


def test_nothing_asked_for_changes_nothing() -> None:
    images, labels = batch(6, 5, 4)
    changed, kept = run(images, labels)
    assert torch.equal(changed, images)
    assert kept.dtype == torch.int64 and torch.equal(kept, labels.long())


EVERYTHING = {
    "rotation_degrees": 20.0, "scaling": 0.1, "noise": 0.1, "brightness": 0.1, "contrast": 0.2,
    "gamma": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("sides", [(8, 12), (8, 12, 8)])
def test_equal_seeds_give_equal_bits_and_finite_values(sides: tuple[int, ...]) -> None:
    images, labels = batch(*sides)
    flips = tuple(range(len(sides)))
    first = run(images, labels, flip_axes=flips, **EVERYTHING)
    second = run(images, labels, flip_axes=flips, **EVERYTHING)
    other = run(images, labels, seed=1, flip_axes=flips, **EVERYTHING)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert torch.isfinite(first[0]).all()
    assert first[0].shape == (4, 2, *(n // 2 for n in sides))
    assert set(first[1].unique().tolist()) <= {0, 1, 2}


def test_image_and_label_flip_together() -> None:
    _, labels = batch(6, 5)
    changed, kept = run(labels[:, None].float(), labels, flip_axes=(0, 1))
    assert torch.equal(changed[:, 0].long(), kept)
    assert not torch.equal(kept, labels.long())


def test_the_identity_is_the_inner_patch() -> None:
    images, labels = batch(8, 10, 12)
    moved, nearest = resample(images[0], labels[0], (1, 2, 3), np.eye(3))
    torch.testing.assert_close(moved, images[0, :, 1:-1, 2:-2, 3:-3], atol=1e-5, rtol=0)
    assert torch.equal(nearest, labels[0, 1:-1, 2:-2, 3:-3])


def test_a_quarter_turn_is_that_of_numpy() -> None:
    images, labels = batch(7, 7, 5)
    turn = rotation((0.0, 0.0, 90.0))
    moved, nearest = resample(images[0], labels[0], (0, 0, 0), turn)
    expected = np.rot90(labels[0].numpy(), -1, axes=(0, 1))
    np.testing.assert_array_equal(nearest, expected)
    np.testing.assert_allclose(moved, np.rot90(images[0].numpy(), -1, axes=(1, 2)), atol=1e-4)


def test_scaling_draws_from_further_out() -> None:
    ramp = torch.arange(9.0).expand(1, 9, 9).clone()
    moved, _ = resample(ramp, torch.zeros(9, 9), (2, 2), 1.5 * np.eye(2))
    np.testing.assert_allclose(moved[0, 2], [1.0, 2.5, 4.0, 5.5, 7.0], atol=1e-4)


@pytest.mark.parametrize("sides", [(16, 24), (16, 24, 16)])
def test_the_margin_leaves_no_empty_corner(sides: tuple[int, ...]) -> None:
    spacing = (1.0, 2.0, 1.5)[: len(sides)]
    settings = Augmentation(rotation_degrees=20, scaling=0.1)
    margin = margin_of(sides, spacing, settings)
    outer = [n + 2 * m for n, m in zip(sides, margin, strict=True)]
    images, labels = torch.ones(20, 1, *outer), torch.ones(20, *outer, dtype=torch.uint8)
    changed, kept = augment(
        images,
        labels,
        margin=margin,
        spacing_mm=spacing,
        settings=settings,
        rng=np.random.default_rng(0),
    )
    assert kept.min() == 1
    torch.testing.assert_close(changed, torch.ones(20, 1, *sides))
    assert margin_of(sides, spacing, Augmentation(noise=0.1)) == (0,) * len(sides)


def test_a_rotation_keeps_lengths_in_mm() -> None:
    """A cross of 8 mm arms on a 1 x 2 mm grid, turned by 90 degrees, swaps its arms in mm."""
    label = torch.zeros(1, 34, 18, dtype=torch.uint8)
    label[0, 8:25, 8] = 1
    spacing = np.array([1.0, 2.0])
    matrix = rotation((90.0,)) * spacing / spacing[:, None]
    _, turned = resample(label[:, None].float()[0], label[0], (0, 0), matrix)
    x, y = turned.numpy().nonzero()
    assert np.ptp(x) <= 1 and 7 <= np.ptp(y) <= 8


def test_intensities_change_as_the_plan_says() -> None:
    images, labels = batch(8, 8, 8)
    noisy, _ = run(images, labels, noise=0.1)
    spread = (noisy - images).flatten(2).std(-1)
    assert 0 < spread.max() < 0.11 and (spread == 0).any()
    shifted = (run(images, labels, brightness=0.3)[0] - images).flatten(2)
    assert shifted.std(-1).max() < 1e-6 and 0 < shifted.abs().max() <= 0.3
    ratio = run(images, labels, contrast=0.2)[0].flatten(2).std(-1) / images.flatten(2).std(-1)
    assert 0.8 <= ratio.min() < ratio.max() <= 1.2
    bent, _ = run(images, labels, gamma=0.5)
    torch.testing.assert_close(bent.flatten(2).amax(-1), images.flatten(2).amax(-1))
    torch.testing.assert_close(bent.flatten(2).amin(-1), images.flatten(2).amin(-1))
    assert not torch.allclose(bent, images)
