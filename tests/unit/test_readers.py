"""Reading a case: what comes out right, and how each broken file is named."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cases import LPS, OBLIQUE, image, label, save, task

from fedseg.errors import DataError
from fedseg.imaging.cases import Case
from fedseg.imaging.findings import CaseError
from fedseg.imaging.readers import map_labels, read_case, read_image
from fedseg.imaging.volumes import place, ras_spacing_of, spacing_of
from fedseg.task import Task


def case(folder: Path, *images: Path, label: Path | None = None) -> Case:
    return Case("somebody", "P1", "a", "train", images or (folder / "i.nii.gz",), label)


def fault(found: Case, study: Task | None = None) -> CaseError:
    with pytest.raises(DataError) as caught:
        read_case(found, study or task())
    assert isinstance(caught.value, CaseError)
    text = str(caught.value)
    assert "somebody" not in text and "/" not in text.replace("1/1", "")
    return caught.value


@pytest.mark.parametrize("affine", [OBLIQUE, LPS, np.eye(4)])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_voxels_and_affine_come_out_as_they_are_in_the_file(
    tmp_path: Path, affine: np.ndarray, ending: str
) -> None:
    one = save(tmp_path / f"i{ending}", image(), affine)
    volume = read_case(
        case(tmp_path, one, label=save(tmp_path / f"l{ending}", label(), affine)), task()
    )
    assert volume.image.shape == (1, 5, 6, 7) and volume.image.dtype == np.float32
    assert np.array_equal(volume.image[0], image())
    assert np.allclose(volume.affine_ras, affine, atol=1e-5)
    assert volume.label is not None and np.array_equal(volume.label, label())
    assert volume.label.dtype == np.uint8


def test_spacing_follows_the_anatomical_axes() -> None:
    turned = np.array([[0, 0, 3.0, 0], [1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])
    assert spacing_of(turned) == (1.0, 2.0, 3.0)
    assert ras_spacing_of(turned) == (3.0, 1.0, 2.0)


def test_channels_come_from_several_files_or_from_one_with_four_axes(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.nii", image()), save(tmp_path / "b.nii", image() + 1)
    both = save(tmp_path / "ab.nii", np.stack([image(), image() + 1], axis=3))
    apart, _ = read_image((a, b), task(channels=2))
    together, _ = read_image((both,), task(channels=2))
    assert np.array_equal(apart, together) and apart.shape == (2, 5, 6, 7)


def test_a_flat_image_is_a_volume_of_one_slice_for_a_2d_study(tmp_path: Path) -> None:
    one = save(tmp_path / "i.nii", image((5, 6)))
    assert read_image((one,), task(dimensions=2))[0].shape == (1, 5, 6, 1)
    assert fault(case(tmp_path, one)).code == "image-axes"


def test_label_values_are_mapped_and_others_named() -> None:
    array = np.array([[[0, 5, 9]]])
    assert map_labels(array, task(), [(5, 2), (9, 0)]).tolist() == [[[0, 2, 0]]]
    with pytest.raises(DataError, match="9"):
        map_labels(array, task(), [(5, 2)])
    with pytest.raises(DataError, match=r"5, 9.*expected 0, 1, 2"):
        map_labels(array, task())
    with pytest.raises(DataError, match="not whole"):
        map_labels(array + 0.5, task())


@pytest.mark.parametrize(
    ("code", "broken"),
    [
        ("image-nan", np.full((5, 6, 7), np.nan, np.float32)),
        ("image-axes", np.zeros((5, 6, 7, 2), np.float32)),
        ("shape-mismatch", np.zeros((5, 6, 8), np.float32)),
        ("voxel-type", np.zeros((5, 6, 7), np.complex64)),
    ],
)
def test_a_broken_image_is_named(tmp_path: Path, code: str, broken: np.ndarray) -> None:
    one = save(tmp_path / "i.nii.gz", broken)
    found = case(tmp_path, one, label=save(tmp_path / "l.nii.gz", label()))
    assert fault(found).code == code


def test_files_that_are_no_nifti_are_named(tmp_path: Path) -> None:
    pointer = tmp_path / "i.nii.gz"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS" in str(fault(case(tmp_path)))
    pointer.write_bytes(b"nothing of the kind")
    assert fault(case(tmp_path)).code == "not-nifti"
    pointer.write_bytes(b"")
    assert fault(case(tmp_path)).code == "not-nifti"
    whole = save(tmp_path / "w.nii.gz", np.random.default_rng(0).random((20, 20, 20)))
    pointer.write_bytes(whole.read_bytes()[:4000])
    assert fault(case(tmp_path)).code == "file-truncated"
    plain = tmp_path / "t.nii"
    plain.write_bytes(gzip.decompress(whole.read_bytes())[:5000])
    assert fault(case(tmp_path, plain)).code == "file-truncated"
    assert fault(case(tmp_path, tmp_path / "gone.nii")).code == "file-missing"


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_named_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    whole = bytearray(save(folder / "w.nii", image()).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 351))] = data.draw(st.integers(0, 255))
    (folder / "i.nii").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        found, _ = read_image((folder / "i.nii",), task())
    except DataError:
        return
    assert found.ndim == 4 and np.isfinite(found).all()


def test_grids_that_disagree_are_named(tmp_path: Path) -> None:
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
    one = save(tmp_path / "i.nii", image())
    mirrored = save(tmp_path / "l.nii", label(), flipped)
    assert fault(case(tmp_path, one, label=mirrored)).code == "affine-mismatch"
    close = np.eye(4)
    close[0, 3] = 0.01
    near = save(tmp_path / "n.nii", label(), close)
    assert read_case(case(tmp_path, one, label=near), task()).label is not None
    other = save(tmp_path / "o.nii", image(), flipped)
    two = case(tmp_path, one, other)
    assert fault(two, task(channels=2)).code == "affine-mismatch"
    assert fault(case(tmp_path, one, other, one), task(channels=2)).code == "channel-count"


def test_an_affine_that_squeezes_space_is_named(tmp_path: Path) -> None:
    flat = np.diag([1.0, 1.0, 1.0, 1.0])
    flat[2] = flat[1]
    one = nibabel.Nifti1Image(image(), None)
    one.header.set_sform(flat, code=2)
    nibabel.save(one, tmp_path / "i.nii.gz")
    assert fault(case(tmp_path)).code == "affine-singular"


@settings(max_examples=40, deadline=None)
@given(
    axes=st.permutations([0, 1, 2]),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    affine=st.sampled_from([OBLIQUE, LPS, np.eye(4)]),
)
def test_a_turned_label_lands_where_it_was(
    axes: list[int], flips: tuple[bool, ...], affine: np.ndarray
) -> None:
    truth = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    turned, move = np.transpose(truth, axes), np.zeros((4, 4))
    move[3, 3] = 1
    for new, old in enumerate(axes):
        move[old, new] = -1 if flips[new] else 1
        move[old, 3] = truth.shape[old] - 1 if flips[new] else 0
    turned = np.flip(turned, tuple(axis for axis in range(3) if flips[axis]))
    placed = place(np.ascontiguousarray(turned), affine @ move, affine, (4, 5, 6))
    assert np.array_equal(placed, truth)


def test_a_part_of_the_grid_is_filled_only_where_asked() -> None:
    part, shift = np.ones((2, 2, 1), np.uint8), np.eye(4)
    shift[:3, 3] = (1, 0, 2)
    whole = place(part, shift, np.eye(4), (4, 4, 4), inside=True)
    assert whole.sum() == 4 and whole[1:3, 0:2, 2].all()
    with pytest.raises(DataError, match="grid"):
        place(part, shift, np.eye(4), (4, 4, 4))
    shift[0, 3] = 3
    with pytest.raises(DataError, match="outside"):
        place(part, shift, np.eye(4), (4, 4, 4), inside=True)
    shift[0, 3] = 0.5
    with pytest.raises(DataError, match="grid"):
        place(part, shift, np.eye(4), (4, 4, 4), inside=True)
