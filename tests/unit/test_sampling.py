"""Turns of patients, and windows of their cases."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedseg.errors import DataError
from fedseg.imaging.transforms import PreparedCase
from fedseg.learning.sampling import (
    PatchSampler,
    cut,
    draw_patients,
    labelled_voxels,
    place_window,
)


def case_of(shape: tuple[int, int, int], *voxels: tuple[int, int, int]) -> PreparedCase:
    image = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(1, *shape)
    label = np.zeros(shape, np.uint8)
    for value, voxel in enumerate(voxels, start=1):
        label[voxel] = value
    return PreparedCase(image, label, np.eye(4), (1.0, 1.0, 1.0))


def test_patients_take_equal_turns_over_short_rounds() -> None:
    names = [f"p{i}" for i in range(7)]
    rounds = [draw_patients(names, first=5 * r, count=5, seed=1, site="A") for r in range(7)]
    turns = [name for drawn in rounds for name in drawn]
    assert set(Counter(turns).values()) == {5}
    assert sorted(turns[7:14]) == names
    assert turns[:7] != turns[7:14]


def test_turns_depend_on_names_and_not_on_their_order() -> None:
    drawn = draw_patients(["b", "a", "c"], first=2, count=9, seed=1, site="A")
    assert drawn == draw_patients(["c", "b", "a"], first=2, count=9, seed=1, site="A")
    assert drawn != draw_patients(["c", "b", "a"], first=2, count=9, seed=1, site="B")
    whole = draw_patients(["a", "b", "c"], first=0, count=11, seed=1, site="A")
    assert whole[2:] == drawn


def test_foreground_windows_hold_each_label_equally_often() -> None:
    label = np.zeros((20, 20, 20), np.uint8)
    label[2:12, 2:12, 2:12] = 1
    label[18, 18, 18] = 2
    rng = np.random.default_rng(0)
    voxels = labelled_voxels(label)
    hits = []
    for _ in range(400):
        x, y, z = place_window(label.shape, (4, 4, 4), voxels, 1.0, rng)
        patch = label[x : x + 4, y : y + 4, z : z + 4]
        assert patch.shape == (4, 4, 4) and patch.any()
        hits.append(bool((patch == 2).any()))
    assert 0.4 < np.mean(hits) < 0.6


def test_other_windows_lie_anywhere_inside() -> None:
    rng = np.random.default_rng(0)
    label = np.ones((6, 5, 4), np.uint8)
    starts = {
        place_window(label.shape, (4, 4, 4), labelled_voxels(label), 0.0, rng) for _ in range(100)
    }
    assert starts == {(x, y, 0) for x in range(3) for y in range(2)}


def test_a_small_image_stands_in_the_middle_of_zeros() -> None:
    case = case_of((2, 4, 4), (1, 1, 1))
    start = place_window((2, 4, 4), (4, 4, 4), (), 0.5, np.random.default_rng(0))
    assert start == (-1, 0, 0)
    patch = cut(case.image, start, (4, 4, 4))
    assert not patch[:, [0, 3]].any()
    np.testing.assert_array_equal(patch[:, 1:3], case.image)


def test_a_window_beyond_the_image_is_zero() -> None:
    assert not cut(np.ones((3, 3, 3)), (5, -9, 0), (2, 2, 2)).any()


def test_a_slice_of_a_flat_task_has_the_labelled_voxel() -> None:
    case = case_of((8, 8, 5), (3, 4, 2))
    sampler = PatchSampler({"p": [case]}, (4, 4, 1), (1, 1, 0), 1.0)
    image, label = sampler.draw("p", np.random.default_rng(0))
    assert image.shape == (1, 6, 6, 1)
    assert label[1:-1, 1:-1].any()
    assert image[0][label == 1] == case.image[0, 3, 4, 2]


def test_a_margin_never_moves_the_window() -> None:
    case = case_of((9, 9, 9), (0, 4, 8), (5, 5, 5))
    plain = PatchSampler({"p": [case]}, (4, 4, 4), (0, 0, 0), 0.5)
    wide = PatchSampler({"p": [case]}, (4, 4, 4), (2, 3, 1), 0.5)
    for seed in range(20):
        image, label = plain.draw("p", np.random.default_rng(seed))
        outer, outer_label = wide.draw("p", np.random.default_rng(seed))
        np.testing.assert_array_equal(outer[:, 2:-2, 3:-3, 1:-1], image)
        np.testing.assert_array_equal(outer_label[2:-2, 3:-3, 1:-1], label)


def test_all_cases_of_a_patient_are_drawn() -> None:
    cases = [case_of((4, 4, 4)), case_of((4, 4, 4), (0, 0, 0))]
    sampler = PatchSampler({"p": cases}, (4, 4, 4), (0, 0, 0), 0.5)
    rng = np.random.default_rng(0)
    assert {bool(sampler.draw("p", rng)[1].any()) for _ in range(20)} == {True, False}


def test_a_case_without_labels_is_refused() -> None:
    case = PreparedCase(np.zeros((1, 4, 4, 4), np.float32), None, np.eye(4), (1.0, 1.0, 1.0))
    with pytest.raises(DataError, match="no label map"):
        PatchSampler({"p": [case]}, (4, 4, 4), (0, 0, 0), 0.5).draw("p", np.random.default_rng(0))


def test_many_voxels_are_thinned_out_evenly() -> None:
    voxels = labelled_voxels(np.ones((60, 60, 60), np.uint8))[0]
    assert len(voxels) <= 20_000 and len(set(np.diff(voxels))) == 1
