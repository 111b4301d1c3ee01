"""Whatever way a scanner stores a volume, the prepared case is the same and the way back exact."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import orientations

from fedseg.imaging.transforms import prepare, restore
from fedseg.imaging.volumes import Volume
from fedseg.task import Task

ORIENTATIONS = [
    np.array([[axis, sign] for axis, sign in zip(order, signs, strict=True)], dtype=float)
    for order in permutations(range(3))
    for signs in product((1, -1), repeat=3)
]
SHAPES = st.tuples(*[st.integers(6, 12)] * 3)


def task_of(spacing: tuple[float, ...]) -> Task:
    return Task.model_validate(
        {
            "dimensions": len(spacing),
            "channels": [{"name": "t1", "modality": "MR"}],
            "labels": {"a": 1, "b": 2, "c": 3},
            "spacing_mm": spacing,
            "patch_size": [8] * len(spacing),
        }
    )


def ras_volume(shape: tuple[int, ...], spacing: tuple[float, ...], seed: int) -> Volume:
    """Noise on a slightly oblique grid whose axes are nearest to R, A and S."""
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = rotation(rng.uniform(-0.4, 0.4, 3)) * spacing
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    image = rng.normal(1000, 100, (1, *shape)).astype(np.float32)
    return Volume(image, rng.integers(0, 4, shape).astype(np.uint8), affine)


def rotation(angles: np.ndarray) -> np.ndarray:
    """A rotation about x, y, then z, radians."""
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turned = turned @ step
    return turned


def stored_as(volume: Volume, turn: np.ndarray) -> Volume:
    """The same volume with its axes permuted and flipped, and the affine that says so."""
    image = np.ascontiguousarray(orientations.apply_orientation(volume.image[0], turn))[None]
    label = np.ascontiguousarray(orientations.apply_orientation(volume.label, turn))
    back = orientations.inv_ornt_aff(turn, volume.image.shape[1:])
    return Volume(image, label, volume.affine_ras @ back)


@settings(max_examples=10, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_equal_spacing_round_trip_is_exact_in_all_48_orientations(
    shape: tuple[int, int, int], seed: int
) -> None:
    task = task_of((1.0, 1.3, 0.7))
    plain = ras_volume(shape, (1.0, 1.3, 0.7), seed)
    expected = prepare(plain, task)
    assert np.array_equal(expected.label, plain.label)
    for turn in ORIENTATIONS:
        stored = stored_as(plain, turn)
        prepared = prepare(stored, task)
        assert np.array_equal(prepared.image, expected.image)
        assert np.array_equal(prepared.label, expected.label)
        np.testing.assert_allclose(prepared.affine_ras, expected.affine_ras, atol=1e-9)
        back = restore(prepared.label, prepared, stored.label.shape, stored.affine_ras)
        assert np.array_equal(back, stored.label)
        assert back.flags.c_contiguous


@settings(max_examples=10, deadline=None)
@given(
    shape=SHAPES,
    spacing=st.tuples(*[st.floats(0.4, 3.0)] * 3),
    turn=st.sampled_from(ORIENTATIONS),
    seed=st.integers(0, 2**31),
)
def test_resampled_case_does_not_depend_on_the_stored_orientation(
    shape: tuple[int, int, int], spacing: tuple[float, ...], turn: np.ndarray, seed: int
) -> None:
    plain = ras_volume(shape, spacing, seed)
    for task in (task_of((1.0, 1.0, 1.0)), task_of((1.0, 1.0))):
        expected = prepare(plain, task)
        stored = stored_as(plain, turn)
        prepared = prepare(stored, task)
        assert prepared.image.shape == expected.image.shape
        np.testing.assert_allclose(prepared.image, expected.image, atol=1e-3)
        np.testing.assert_allclose(prepared.affine_ras, expected.affine_ras, atol=1e-6)
        back = restore(prepared.label, prepared, stored.label.shape, stored.affine_ras)
        assert back.shape == stored.label.shape
        assert back.dtype == np.uint8


@settings(max_examples=20, deadline=None)
@given(spacing=st.tuples(*[st.floats(0.5, 2.0)] * 3), turn=st.sampled_from(ORIENTATIONS))
def test_a_prepared_mask_lies_where_it_lay_in_the_room(
    spacing: tuple[float, ...], turn: np.ndarray
) -> None:
    plain = ras_volume((14, 15, 16), spacing, seed=1)
    plain.label[...] = 0
    plain.label[4:10, 5:11, 3:12] = 1
    stored = stored_as(plain, turn)
    prepared = prepare(stored, task_of((1.0, 1.0, 1.0)))
    centre = lambda label, affine: affine[:3, :3] @ np.argwhere(label).mean(0) + affine[:3, 3]  # noqa: E731
    there = centre(prepared.label, prepared.affine_ras)
    back = restore(prepared.label, prepared, stored.label.shape, stored.affine_ras)
    here = centre(stored.label, stored.affine_ras)
    np.testing.assert_allclose(there, here, atol=0.6)
    np.testing.assert_allclose(centre(back, stored.affine_ras), here, atol=0.6)
