"""One case under one model: what is measured, what it depends on, and a patient of several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedseg.errors import DataError
from fedseg.evaluation.measuring import Measuring, measure_case, patient_of, reliability_of
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Case
from fedseg.plan import StudyPlan

PLAN = StudyPlan.model_validate(
    {
        "study": "tiny",
        "task": {
            "dimensions": 3,
            "channels": [{"name": "T1", "modality": "MR"}],
            "labels": {"bright": 1, "dark": 2},
            "spacing_mm": [1.0, 1.0, 2.0],
            "patch_size": [8, 8, 8],
            "normalisation": {"MR": {"percentiles": [0, 100]}},
        },
        "model": {"options": {"channels": [4, 8]}},
        "evaluation": {"overlap": 0.0},
    }
)
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
HOW = Measuring(PLAN, (), ("bright",), 1.0)


class Bright(nn.Module):
    """Label 1 above the mean and label 2 below minus two; each sure by 4 : 1 : 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        image = self.scale * images[:, 0]
        one, two = image > 0.5, image < -2
        sure = float(np.log(4))
        return torch.stack([sure * ~(one | two), sure * one, sure * two], 1)


def written(folder: Path, name: str, *, shift: int = 0, patient: str = "p") -> Case:
    """Two bright blocks; the truth is moved, and has only the first of them."""
    image = np.zeros((16, 16, 12), np.float32)
    image[2:6, 2:6, 2:6] = image[10:13, 10:13, 6:9] = 100
    label = np.zeros(image.shape, np.uint8)
    label[2 + shift : 6 + shift, 2:6, 2:6] = 1
    paths = []
    for kind, array in (("image", image), ("label", label)):
        paths.append(folder / f"{name}-{kind}.nii.gz")
        nibabel.nifti1.Nifti1Image(array, AFFINE).to_filename(paths[-1])
    return Case(name, patient, "A", "test", (paths[0],), paths[1])


@pytest.fixture
def cache(tmp_path: Path) -> CaseCache:
    return CaseCache(tmp_path / "cache", PLAN.task)


def test_a_case_by_hand(tmp_path: Path, cache: CaseCache) -> None:
    case = written(tmp_path, "a", shift=2)
    found = measure_case(Bright(), case, cache, HOW, "0" * 64)
    bright = found.labels["bright"]
    assert bright.dice == pytest.approx(2 * 32 / (64 + 64 + 27))
    assert bright.volume_ml == pytest.approx(64 * 2 / 1000)
    assert bright.predicted_ml == pytest.approx((64 + 27) * 2 / 1000)
    assert bright.lesions is not None
    assert bright.lesions.model_dump() == {"lesions": 1, "found": 1, "predicted": 2, "right": 1}
    assert found.labels["dark"].dice is None and found.labels["dark"].lesions is None
    counts = [b.voxels for b in found.reliability]
    assert sum(counts) == 64 + 32 + 27 == counts[6]
    assert found.reliability[6].confidence == pytest.approx(2 / 3 * sum(counts), rel=1e-4)
    assert found.reliability[6].right == 32 and found.failures == () and found.seconds > 0


def test_a_label_that_is_not_annotated_is_neither_measured_nor_counted(
    tmp_path: Path, cache: CaseCache
) -> None:
    case = replace(written(tmp_path, "a"), annotated=("dark",))
    found = measure_case(Bright(), case, cache, HOW, "0" * 64)
    assert set(found.labels) == {"dark"} and found.failures == ()
    assert sum(b.voxels for b in found.reliability) == 0
    patient = patient_of("global", "p", [found])
    assert patient.dice is None and patient.calibration_error is None


def test_a_patient_is_the_mean_of_the_cases_and_fails_with_one(
    tmp_path: Path, cache: CaseCache
) -> None:
    good, bad = written(tmp_path, "a"), written(tmp_path, "b", shift=2)
    records = [measure_case(Bright(), case, cache, HOW, "0" * 64) for case in (good, bad)]
    failed = records[1].model_copy(
        update={"failures": measure_case(Bright(), good, cache, HOW, "0" * 64).failures}
    )
    patient = patient_of("global", "p", [records[0], failed])
    scores = [record.labels["bright"].dice for record in records]
    assert patient.cases == 2 and patient.dice == pytest.approx(np.mean(scores))  # type: ignore[arg-type]
    lesions = patient.labels["bright"].lesions
    assert lesions is not None and lesions.predicted == 4 and lesions.lesions == 2
    voxels = [sum(b.voxels for b in record.reliability) for record in records]
    assert sum(b.voxels for b in reliability_of(records)) == sum(voxels)


def test_a_record_depends_on_model_case_and_settings(tmp_path: Path) -> None:
    case, other = written(tmp_path, "a"), written(tmp_path, "b", shift=1)
    keys = {
        HOW.key("a" * 64, case),
        HOW.key("b" * 64, case),
        HOW.key("a" * 64, other),
        HOW.key("a" * 64, replace(case, annotated=("dark",))),
        replace(HOW, tolerance_mm=2.0).key("a" * 64, case),
        replace(HOW, lesions=()).key("a" * 64, case),
        replace(HOW, label_map=((1, 2),)).key("a" * 64, case),
    }
    assert len(keys) == 7 and HOW.key("a" * 64, case) in keys


def test_a_case_without_a_label_is_refused(tmp_path: Path, cache: CaseCache) -> None:
    bare = replace(written(tmp_path, "a"), label=None)
    with pytest.raises(DataError, match="no label map"):
        measure_case(Bright(), bare, cache, HOW, "0" * 64)
