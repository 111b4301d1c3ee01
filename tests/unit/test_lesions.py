"""Lesions found by overlap."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedseg.evaluation.lesions import components, detect, precision, sensitivity, summed
from fedseg.evaluation.observations import Detection

SMALL = arrays(np.bool_, (5, 4, 3), elements=st.booleans())


def boxes(*corners: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((30, 30, 3), bool)
    for x, y in corners:
        mask[x, y] = True
    return mask


def test_one_found_one_missed_one_invented() -> None:
    truth = boxes((slice(0, 4), slice(0, 4)), (slice(10, 14), slice(10, 14)))
    prediction = boxes((slice(2, 6), slice(0, 4)), (slice(20, 24), slice(20, 24)))
    found = detect(prediction, truth)
    assert found == Detection(lesions=2, found=1, predicted=2, right=1)
    assert (found.missed, found.false) == (1, 1)
    assert sensitivity(found) == 0.5 and precision(found) == 0.5


def test_a_tenth_must_be_covered() -> None:
    truth = boxes((slice(0, 10), slice(0, 1)))
    one = boxes((slice(9, 10), slice(0, 1)))
    assert detect(one, truth).found == 1
    assert detect(one, truth, overlap=0.11).found == 0
    wide = boxes((slice(9, 29), slice(0, 1)))
    assert detect(wide, truth) == Detection(lesions=1, found=1, predicted=1, right=0)


def test_a_blob_over_two_lesions_finds_both_and_counts_once() -> None:
    truth = boxes((slice(0, 2), slice(0, 2)), (slice(5, 7), slice(0, 2)))
    found = detect(boxes((slice(0, 7), slice(0, 2))), truth)
    assert found == Detection(lesions=2, found=2, predicted=1, right=1)


def test_corners_hold_together_and_nothing_is_nothing() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    assert components(mask)[1] == 2
    nothing = detect(np.zeros_like(mask), np.zeros_like(mask))
    assert nothing == Detection(lesions=0, found=0, predicted=0, right=0)
    assert sensitivity(nothing) is None and precision(nothing) is None
    assert detect(np.zeros_like(mask), mask).missed == 2
    assert summed([nothing, detect(mask, mask)]) == detect(mask, mask)
    with pytest.raises(ValueError, match="shape"):
        detect(mask, mask[:2])


def flooded(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Components by walking from voxel to voxel."""
    left = set(zip(*map(list, np.nonzero(mask)), strict=True))
    found = []
    while left:
        front, own = [left.pop()], set()
        while front:
            voxel = front.pop()
            own.add(voxel)
            near = {
                tuple(int(v + d) for v, d in zip(voxel, step, strict=True))
                for step in product((-1, 0, 1), repeat=3)
            }
            front += near & left
            left -= near
        found.append({tuple(map(int, voxel)) for voxel in own})
    return found


@settings(max_examples=60, deadline=None)
@given(SMALL, SMALL)
def test_agrees_with_walking_from_voxel_to_voxel(prediction: np.ndarray, truth: np.ndarray) -> None:
    found = detect(prediction, truth)
    true, predicted = flooded(truth), flooded(prediction)
    inside = [sum(bool(prediction[v]) for v in lesion) / len(lesion) for lesion in true]
    right = [sum(bool(truth[v]) for v in lesion) / len(lesion) for lesion in predicted]
    assert (found.lesions, found.predicted) == (len(true), len(predicted))
    assert found.found == sum(share >= 0.1 for share in inside)
    assert found.right == sum(share >= 0.1 for share in right)
