"""Phantoms by domain randomisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from fedseg.imaging.randomised import Anatomy, randomised_case
from fedseg.task import Task

KINDS: tuple[Anatomy, ...] = ("chain", "apart", "nested")


def task_of(dimensions: int = 3, labels: int = 2, modality: str = "MR", **more: Any) -> Task:
    return Task.model_validate(
        {
            "dimensions": dimensions,
            "channels": [{"name": "T1", "modality": modality}],
            "labels": {f"part{i}": i for i in range(1, labels + 1)},
            "spacing_mm": [1.0, 1.5, 1.0][:dimensions],
            "patch_size": [24, 32, 24][:dimensions],
            "normalisation": {"CT": {"window_hu": (-100.0, 200.0)}} if modality == "CT" else {},
        }
        | more
    )


@pytest.mark.parametrize("anatomy", KINDS)
def test_a_phantom_is_a_function_of_seed_and_number(anatomy: Anatomy) -> None:
    task = task_of()
    first = randomised_case(task, 1, 5, anatomy=anatomy)
    again = randomised_case(task, 1, 5, anatomy=anatomy)
    assert np.array_equal(first.image, again.image)
    assert first.label is not None and again.label is not None
    assert np.array_equal(first.label, again.label)
    for seed, number in ((1, 6), (2, 5)):
        other = randomised_case(task, seed, number, anatomy=anatomy)
        same = other.image.shape == first.image.shape
        assert not (same and np.array_equal(other.image, first.image))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("modality", ["MR", "CT"])
@pytest.mark.parametrize("anatomy", KINDS)
def test_a_phantom_is_what_the_task_asks_for(
    dimensions: int, modality: str, anatomy: Anatomy
) -> None:
    channels = [{"name": n, "modality": modality} for n in ("first", "second")]
    task = task_of(dimensions, 3, modality, channels=channels)
    seen: set[int] = set()
    for number in range(6):
        case = randomised_case(task, 3, number, anatomy=anatomy)
        assert case.label is not None and case.image.shape == (2, *case.label.shape)
        assert case.image.dtype == np.float32 and case.label.dtype == np.uint8
        assert np.isfinite(case.image).all()
        sides = zip(case.label.shape, task.patch_size, strict=False)
        assert all(n <= side <= 1.36 * n + 1 for side, n in sides)
        assert not np.allclose(case.image[0], case.image[1])
        seen |= set(np.unique(case.label).tolist())
    assert seen == {0, 1, 2, 3}


def test_a_chain_s_first_label_lies_in_front() -> None:
    ahead = 0
    for number in range(20):
        label = randomised_case(task_of(), 4, number).label
        assert label is not None
        first, second = (ndimage.center_of_mass(label == kind) for kind in (1, 2))
        ahead += first[1] > second[1]
    assert ahead >= 18


def test_nested_labels_lie_inside_the_one_before() -> None:
    for number in range(8):
        label = randomised_case(task_of(labels=3), 5, number, anatomy="nested").label
        assert label is not None
        around = ndimage.binary_dilation(label == 3) & (label != 3)
        inside = set(np.unique(label[around]).tolist())
        assert inside <= {0, 1, 2} and (not inside or 2 in inside)


def test_contrast_is_as_often_one_way_as_the_other() -> None:
    brighter = []
    for number in range(30):
        case = randomised_case(task_of(), 6, number)
        assert case.label is not None
        organ = case.label > 0
        rim = ndimage.binary_dilation(organ, iterations=3) & ~organ
        brighter.append(float(case.image[0][organ].mean() - case.image[0][rim].mean()))
    assert 6 <= sum(np.array(brighter) > 0) <= 24
    assert np.mean(np.abs(brighter) > 0.1) > 0.8
