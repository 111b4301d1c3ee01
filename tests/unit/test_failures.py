"""Empty and wild predictions."""

from __future__ import annotations

import numpy as np
import pytest

from fedseg.evaluation.failures import failures_of

LABELS = {"head": 1, "body": 2}
SPACING = (1.0, 1.0, 2.0)


def image(**parts: tuple[slice, slice, slice]) -> np.ndarray:
    mask = np.zeros((40, 40, 30), np.uint8)
    for name, box in parts.items():
        mask[box] = LABELS[name]
    return mask


BOX = (slice(5, 10), slice(5, 10), slice(5, 10))
TRUTH = image(head=BOX)


def kinds(prediction: np.ndarray, truth: np.ndarray = TRUTH) -> list[tuple[str, str]]:
    return [(f.label, f.kind) for f in failures_of(prediction, truth, SPACING, LABELS)]


def test_a_good_prediction_and_a_rightly_empty_one_are_no_failures() -> None:
    assert kinds(TRUTH) == []
    assert kinds(image(head=(slice(5, 9), slice(5, 10), slice(5, 11)))) == []
    assert kinds(image(), image()) == []


def test_nothing_where_something_is() -> None:
    (failure,) = failures_of(image(), TRUTH, SPACING, LABELS)
    assert (failure.label, failure.kind) == ("head", "empty")
    assert failure.reason == "no head was predicted"


def test_something_where_nothing_is_unless_a_speck() -> None:
    both = TRUTH.copy()
    both[20:23, 20:23, 20] = 2
    assert kinds(both) == []
    both[20:23, 20:24, 20] = 2
    assert kinds(both) == [("body", "invented")]


@pytest.mark.parametrize(("length", "found"), [(15, []), (16, ["volume"])])
def test_more_than_three_times_the_volume_is_wild(length: int, found: list[str]) -> None:
    wide = image(head=(slice(5, 5 + length), slice(5, 10), slice(5, 10)))
    assert [kind for _, kind in kinds(wide)] == found
    assert [kind for _, kind in kinds(TRUTH, wide)] == found


@pytest.mark.parametrize(("z", "found"), [(19, []), (20, [("head", "far")])])
def test_a_part_far_away_is_wild_by_mm_not_by_voxels(z: int, found: list[object]) -> None:
    stray = TRUTH.copy()
    stray[5:9, 5:9, z : z + 1] = 1
    assert kinds(stray) == found


def test_a_far_speck_is_no_failure() -> None:
    stray = TRUTH.copy()
    stray[30:32, 30:33, 25] = 1
    assert kinds(stray) == []


def test_labels_that_are_not_asked_about_are_not_looked_at() -> None:
    both = TRUTH.copy()
    both[20:30, 20:30, 20] = 2
    assert failures_of(both, TRUTH, SPACING, {"head": 1}) == ()
