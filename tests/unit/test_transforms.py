"""Reorientation, resampling and normalisation, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedseg.errors import DataError
from fedseg.imaging.transforms import prepare, restore
from fedseg.imaging.volumes import Volume
from fedseg.task import Task


def task_of(modality: str = "MR", spacing: tuple[float, ...] = (1, 1, 1), **more: object) -> Task:
    return Task.model_validate(
        {
            "dimensions": len(spacing),
            "channels": [{"name": "a", "modality": modality}],
            "labels": {"head": 1, "body": 2},
            "spacing_mm": spacing,
            "patch_size": [8] * len(spacing),
            "normalisation": {"CT": {"window_hu": [-100, 300]}},
        }
        | more
    )


def volume_of(image: np.ndarray, affine: np.ndarray, label: np.ndarray | None = None) -> Volume:
    return Volume(image.astype(np.float32), label, affine)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def blobs(shape: tuple[int, int, int]) -> np.ndarray:
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    label = np.zeros(shape, dtype=np.uint8)
    label[x**2 + y**2 + z**2 < 0.5] = 2
    label[(x**2 + y**2 + z**2 < 0.5) & (y + 0.37 * x - 0.61 * z > 0.1)] = 1
    return label


def test_lps_file_is_turned_to_ras() -> None:
    image = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    affine = np.array([[-1, 0, 0, 5], [0, -1, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1.0]])
    prepared = prepare(volume_of(image, affine), task_of("CT"))
    expected = np.diag([1.0, 1, 1, 1])
    expected[:3, 3] = 4, 4, 7
    np.testing.assert_allclose(prepared.affine_ras, expected)
    np.testing.assert_allclose(prepared.image, (image[:, ::-1, ::-1] - 100) / 200, rtol=1e-6)
    assert prepared.image.flags.c_contiguous


def test_ct_window_maps_to_minus_one_and_one() -> None:
    image = np.array([-1000, -100, 100, 300, 3000], dtype=np.float32).reshape(1, 5, 1, 1)
    prepared = prepare(volume_of(image, np.eye(4)), task_of("CT"))
    np.testing.assert_allclose(prepared.image.ravel(), [-1, -1, 0, 1, 1])


def test_mr_scale_of_the_scanner_does_not_matter() -> None:
    image = noise(1, 9, 8, 7)
    image[0, 0, 0, 0] = 1e6
    plain = prepare(volume_of(image, np.eye(4)), task_of()).image
    scaled = prepare(volume_of(image * 512 + 4096, np.eye(4)), task_of()).image
    np.testing.assert_allclose(plain, scaled, atol=1e-3)
    assert abs(plain.mean()) < 1e-5
    assert abs(plain.std() - 1) < 1e-5
    assert plain.max() < 4


def test_channels_are_normalised_by_their_own_modality() -> None:
    task = task_of(
        channels=[{"name": "ct", "modality": "CT"}, {"name": "mr", "modality": "MR"}],
    )
    image = np.concatenate([np.full((1, 4, 4, 4), 300.0), noise(1, 4, 4, 4)])
    prepared = prepare(volume_of(image, np.eye(4)), task)
    assert (prepared.image[0] == 1).all()
    assert abs(prepared.image[1].std() - 1) < 1e-5


def test_linear_ramp_survives_resampling_in_world_space() -> None:
    affine = np.diag([1.0, 2.0, 0.5, 1])
    affine[:3, 3] = -10, 20, 30
    index = np.stack(np.meshgrid(*map(np.arange, (12, 10, 24)), indexing="ij"), -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    ramp = (world @ [1.0, -2.0, 0.5])[None]
    wide = task_of("CT", normalisation={"CT": {"window_hu": [-1, 1]}})
    wide = wide.model_copy(
        update={
            "normalisation": wide.normalisation.model_copy(
                update={"CT": wide.normalisation.CT.model_copy(update={"window_hu": (-500, 500)})}
            )
        }
    )
    prepared = prepare(volume_of(ramp, affine), wide)
    assert prepared.image.shape == (1, 12, 20, 12)
    assert prepared.spacing_mm == pytest.approx((1, 1, 1))
    index = np.stack(np.meshgrid(*map(np.arange, (12, 20, 12)), indexing="ij"), -1)
    world = index @ prepared.affine_ras[:3, :3].T + prepared.affine_ras[:3, 3]
    expected = world @ [1.0, -2.0, 0.5] / 500
    inner = (slice(None), slice(2, -2), slice(2, -2))
    np.testing.assert_allclose(prepared.image[0][inner], expected[inner], atol=1e-5)


def test_the_field_of_view_keeps_its_centre() -> None:
    affine = np.diag([0.7, 1.3, 3.0, 1])
    prepared = prepare(volume_of(noise(1, 31, 20, 7), affine), task_of())
    own = affine @ [15, 9.5, 3, 1]
    last = np.array(prepared.image.shape[1:]) - 1
    np.testing.assert_allclose(prepared.affine_ras @ [*(last / 2), 1], own)


def test_nearly_equal_spacing_is_not_resampled() -> None:
    image = noise(1, 6, 7, 8)
    prepared = prepare(volume_of(image, np.diag([1.0005, 0.9995, 1, 1])), task_of())
    same = prepare(volume_of(image, np.eye(4)), task_of())
    np.testing.assert_array_equal(prepared.image, same.image)
    assert prepared.spacing_mm == pytest.approx((1.0005, 0.9995, 1))


def test_two_dimensional_task_keeps_its_slices() -> None:
    affine = np.diag([2.0, 2.0, 5.0, 1])
    label = blobs((10, 12, 6))
    prepared = prepare(volume_of(noise(1, 10, 12, 6), affine, label), task_of("MR", (1, 1)))
    assert prepared.image.shape == (1, 20, 24, 6)
    assert prepared.spacing_mm == pytest.approx((1, 1, 5))
    assert prepared.label is not None
    assert prepared.label.shape == (20, 24, 6)


def test_resampled_labels_keep_volume_and_values() -> None:
    label = blobs((30, 28, 26))
    affine = np.diag([1.5, 0.8, 1.2, 1])
    prepared = prepare(volume_of(noise(1, 30, 28, 26), affine, label), task_of())
    assert prepared.label is not None
    before = np.bincount(label.ravel()) * 1.5 * 0.8 * 1.2
    after = np.bincount(prepared.label.ravel())
    assert after == pytest.approx(before, rel=0.05)
    back = restore(prepared.label, prepared, label.shape, affine)
    for value in (1, 2):
        ours, truth = back == value, label == value
        assert 2 * (ours & truth).sum() / (ours.sum() + truth.sum()) > 0.95


def test_labels_interpolate_alike_cropped_and_whole() -> None:
    # the box around a label must not change what linear interpolation of the whole volume gives
    from scipy import ndimage

    label = blobs((17, 19, 23))
    affine = np.diag([0.6, 1.7, 1.1, 1])
    prepared = prepare(volume_of(noise(1, 17, 19, 23), affine, label), task_of())
    step = 1 / np.array([0.6, 1.7, 1.1])
    shape = prepared.image.shape[1:]
    offset = (np.array(label.shape) - 1) / 2 - step * (np.array(shape) - 1) / 2
    share = [
        ndimage.affine_transform(
            (label == v).astype(np.float64), step, offset, shape, order=1, mode="nearest"
        )
        for v in range(3)
    ]
    np.testing.assert_array_equal(prepared.label, np.argmax(share, axis=0))


def test_strong_downsampling_does_not_alias() -> None:
    stripes = np.zeros((1, 64, 8, 8))
    stripes[:, ::2] = 100.0
    prepared = prepare(volume_of(stripes, np.diag([1.0, 4, 4, 1])), task_of("CT", (4.0, 4, 4)))
    expected = (50 - 100) / 200
    assert np.abs(prepared.image[:, 2:-2] - expected).max() < 0.05


def test_restore_refuses_a_mask_of_another_image() -> None:
    prepared = prepare(volume_of(noise(1, 6, 6, 6), np.eye(4)), task_of())
    with pytest.raises(ValueError, match="prepared grid"):
        restore(np.zeros((5, 6, 6), np.uint8), prepared, (6, 6, 6), np.eye(4))
    oblique = np.eye(4)
    oblique[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    with pytest.raises(ValueError, match="affine"):
        restore(np.zeros((6, 6, 6), np.uint8), prepared, (6, 6, 6), oblique)


@pytest.mark.parametrize(
    ("image", "affine", "label", "message"),
    [
        (np.ones((1, 4, 4, 4)), np.eye(4), None, "no contrast"),
        (np.full((1, 4, 4, 4), np.nan), np.eye(4), None, "not finite"),
        (noise(2, 4, 4, 4), np.eye(4), None, "1 channel"),
        (noise(1, 4, 4, 0), np.eye(4), None, "three axes"),
        (noise(1, 4, 4, 4), np.diag([1.0, 0, 1, 1]), None, "repair the header"),
        (noise(1, 4, 4, 4), np.full((4, 4), np.nan), None, "repair the header"),
        (noise(1, 4, 4, 4), np.eye(4), np.zeros((4, 4, 5), np.uint8), "own grid"),
        (noise(1, 4, 4, 4), np.eye(4), np.full((4, 4, 4), 3, np.uint8), "0 to 2"),
        (noise(1, 4, 4, 4), np.eye(4), np.full((4, 4, 4), -1, np.int16), "0 to 2"),
    ],
)
def test_what_cannot_be_prepared_says_what_to_do(
    image: np.ndarray, affine: np.ndarray, label: np.ndarray | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(volume_of(image, affine, label), task_of())


def test_the_volume_is_left_as_it_was() -> None:
    image = noise(1, 5, 6, 7)
    label = blobs((5, 6, 7))
    volume = Volume(image.copy(), label.copy(), np.eye(4))
    prepared = prepare(volume, task_of())
    assert prepared.label is not None
    prepared.label[:] = 0
    np.testing.assert_array_equal(volume.image, image)
    np.testing.assert_array_equal(volume.label, label)
