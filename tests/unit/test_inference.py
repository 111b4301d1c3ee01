"""Masks by sliding windows, cohorts and written masks."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedseg.errors import DataError, StorageError
from fedseg.evaluation.evaluate import evaluate_cohort
from fedseg.evaluation.inference import predict_mask, predict_with_confidence
from fedseg.evaluation.predict import predict_images, write_mask
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Case, Cohort
from fedseg.imaging.transforms import PreparedCase
from fedseg.models.zoo import build_network
from fedseg.plan import StudyPlan


def plan_of(dimensions: int = 3) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "study": "tiny",
            "task": {
                "dimensions": dimensions,
                "channels": [{"name": "T1", "modality": "MR"}],
                "labels": {"bright": 1},
                "spacing_mm": [1.0] * dimensions,
                "patch_size": [8] * dimensions,
                "normalisation": {"MR": {"percentiles": [0, 100]}},
            },
            "model": {"options": {"channels": [4, 8]}},
        }
    )


class Threshold(nn.Module):
    """Label 1 where the image is above a level; sees each voxel by itself."""

    def __init__(self, level: float = 0.0) -> None:
        super().__init__()
        self.level = level
        self.scale = nn.Parameter(torch.ones(()))
        self.shapes: set[tuple[int, ...]] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.add(tuple(images.shape[1:]))
        assert not self.training
        images = self.scale * (images - self.level)
        return torch.cat([-images, images], 1)


def case_of(shape: tuple[int, int, int]) -> PreparedCase:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, *shape)).astype(np.float32)
    label = (image[0] > 0).astype(np.uint8)
    return PreparedCase(image, label, np.eye(4), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("shape", [(13, 9, 20), (5, 8, 3), (4, 4, 1)])
def test_every_voxel_gets_its_own_label_whatever_the_size(
    dimensions: int, shape: tuple[int, int, int]
) -> None:
    network, case = Threshold().train(), case_of(shape)
    mask = predict_mask(network, case, plan_of(dimensions).task, 0.5)
    assert mask.dtype == np.uint8 and mask.flags.c_contiguous
    np.testing.assert_array_equal(mask, case.label)
    assert network.shapes == {(1, *[8] * dimensions)}
    assert network.training


@pytest.mark.parametrize("dimensions", [2, 3])
def test_equal_models_give_equal_masks_and_no_gradients(dimensions: int) -> None:
    plan = plan_of(dimensions)
    torch.manual_seed(0)
    network = build_network(plan.model, plan.task)
    first = predict_mask(network, case_of((13, 9, 10)), plan.task, 0.25)
    assert first.any() and not first.all()
    np.testing.assert_array_equal(
        first, predict_mask(network, case_of((13, 9, 10)), plan.task, 0.25)
    )
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("dimensions", [2, 3])
def test_confidence_is_the_softmax_of_the_label_that_is_chosen(dimensions: int) -> None:
    network, case = Threshold().train(), case_of((13, 9, 4))
    mask, confidence = predict_with_confidence(network, case, plan_of(dimensions).task, 0.5)
    np.testing.assert_array_equal(mask, predict_mask(network, case, plan_of(dimensions).task, 0.5))
    expected = 1 / (1 + np.exp(-2 * np.abs(case.image[0])))
    np.testing.assert_allclose(confidence, expected, atol=1e-5)
    assert confidence.dtype == np.float32 and network.training


HALF = (0.5 - 0.15) / (0.15 * 0.85) ** 0.5  # half of the brightness of 15 % bright voxels
AFFINE = np.array([[0, -2.0, 0, 30], [1.0, 0, 0, -10], [0, 0, 1.5, 5], [0, 0, 0, 1]])


def write(path: Path, array: Any, affine: Any = AFFINE) -> Path:
    nibabel.nifti1.Nifti1Image(array, affine).to_filename(path)
    return path


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    """Two patients, one with two cases: two bright blocks, whose second half is not labelled."""
    cases = []
    for name, patient in (("c1", "p1"), ("c2", "p1"), ("c3", "p2")):
        image = np.zeros((16, 12, 10), np.float32)
        image[4:12, 2:8, 2:8] = 100.0
        label = (image > 0).astype(np.uint8)
        if name == "c2":
            label[8:12] = 0
        images = (write(tmp_path / f"{name}.nii.gz", image),)
        path = write(tmp_path / f"{name}_label.nii.gz", label)
        cases.append(Case(name, patient, "A", "val", images, path))
    return Cohort("A", tuple(cases))


@pytest.mark.parametrize("native", [False, True])
def test_a_cohort_is_measured_patient_by_patient(
    cohort: Cohort, tmp_path: Path, native: bool
) -> None:
    plan = plan_of()
    cache = CaseCache(tmp_path / "cache", plan.task)
    scores = evaluate_cohort(Threshold(HALF), cohort, cache, plan, ("dice", "nsd"), native=native)
    assert [(s.site, s.patient, s.cases) for s in scores] == [("A", "p1", 2), ("A", "p2", 1)]
    one, two = (s.mean_dice for s in scores)
    assert one is not None and two is not None
    assert two == pytest.approx(1.0, abs=0.06)
    assert one == pytest.approx((1 + 2 / 3) / 2, abs=0.06)
    assert scores[0].hd95_mm == {} and scores[0].nsd["bright"] is not None


def test_a_case_without_labels_cannot_be_measured(cohort: Cohort, tmp_path: Path) -> None:
    plan, (case, *_) = plan_of(), cohort.cases
    bare = Cohort("A", (Case(case.name, "p1", "A", "val", case.images, None),))
    with pytest.raises(DataError, match="no label"):
        evaluate_cohort(
            Threshold(HALF), bare, CaseCache(tmp_path / "cache", plan.task), plan, ("dice",)
        )


def test_masks_are_written_in_the_images_own_geometry(cohort: Cohort, tmp_path: Path) -> None:
    case = cohort.cases[0]
    (path,) = predict_images(Threshold(HALF), plan_of(), [case.images], tmp_path / "out")
    assert path.name == "c1_mask.nii.gz"
    assert list(path.parent.iterdir()) == [path]
    written: Any = nibabel.loadsave.load(path)
    assert case.label is not None
    truth = np.asarray(nibabel.loadsave.load(case.label).dataobj)  # type: ignore[attr-defined]
    mask = np.asarray(written.dataobj)
    assert mask.dtype == np.uint8 and mask.shape == truth.shape
    np.testing.assert_allclose(written.affine, AFFINE)
    np.testing.assert_allclose(written.get_qform(), AFFINE, atol=1e-5)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.94


def test_a_sheared_affine_is_kept_in_the_sform(cohort: Cohort, tmp_path: Path) -> None:
    sheared = AFFINE.copy()
    sheared[0, 2] = 0.3
    image: Any = nibabel.loadsave.load(cohort.cases[0].images[0])
    image = write(tmp_path / "tilted.nii", np.asarray(image.dataobj), sheared)
    (path,) = predict_images(Threshold(HALF), plan_of(), [[image]], tmp_path / "out")
    written: Any = nibabel.loadsave.load(path)
    np.testing.assert_allclose(written.affine, sheared, atol=1e-6)
    assert int(written.header["qform_code"]) == 0


def test_equal_masks_give_equal_files(cohort: Cohort, tmp_path: Path) -> None:
    mask = np.eye(3, dtype=np.uint8)[None]
    write_mask(mask, AFFINE, tmp_path / "a.nii.gz")
    write_mask(mask, AFFINE, tmp_path / "b.nii.gz")
    write_mask(mask, AFFINE, tmp_path / "c.nii")
    packed = (tmp_path / "a.nii.gz").read_bytes()
    assert packed == (tmp_path / "b.nii.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "c.nii").read_bytes()
    with pytest.raises(StorageError, match="cannot write"):
        write_mask(mask, AFFINE, tmp_path / "c.nii" / "d.nii.gz")


def test_two_images_of_one_name_are_refused_before_any_is_written(
    cohort: Cohort, tmp_path: Path
) -> None:
    (image,) = cohort.cases[0].images
    with pytest.raises(DataError, match="overwrite"):
        list(predict_images(Threshold(HALF), plan_of(), [[image], [image]], tmp_path / "out"))
    assert not (tmp_path / "out").exists()
