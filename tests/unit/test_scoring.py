"""Which patients are measured: by a study at its end, and by `fedseg evaluate` later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from small_cases import folder_of, task
from typer.testing import CliRunner

from fedseg.cli import app
from fedseg.errors import DataError, PlanError
from fedseg.imaging.cases import Case, Cohort, Split
from fedseg.imaging.manifests import read_manifest
from fedseg.modelfile import save_model
from fedseg.models.devices import require_device
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.simulation.scoring import require_measurable, split_to_measure


def cohort(site: str, **labels: str) -> Cohort:
    """val="yn" makes two val patients, the second without a label."""
    cases = []
    splits: tuple[Split, ...] = ("train", "val", "test")
    for split in splits:
        for n, letter in enumerate(labels.get(split, "")):
            name = f"{site}{split}{n}"
            label = Path("label") if letter == "y" else None
            cases.append(Case(name, name, site, split, (Path("image"),), label))
    return Cohort(site, tuple(cases))


@pytest.mark.parametrize(
    ("first", "second", "split"),
    [
        ({"val": "y", "test": "y"}, {"val": "y", "test": "y"}, "test"),
        ({"val": "y", "test": "yn"}, {"val": "y", "test": "ny"}, "test"),
        ({"val": "y", "test": "n"}, {"val": "y", "test": "y"}, "val"),
        ({"val": "y"}, {"test": "y"}, "val"),
        ({"val": "n"}, {"test": "y"}, "test"),
    ],
)
def test_a_study_measures_on_test_where_all_have_labels_there(
    first: dict[str, str], second: dict[str, str], split: Split
) -> None:
    cohorts = [cohort("a", train="y", **first), cohort("b", train="y", **second)]
    assert split_to_measure(cohorts) == split
    require_measurable(cohorts)


def test_a_study_that_nobody_can_measure_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 2 sites has a usable labelled patient"):
        require_measurable([cohort("a", train="yy", test="n"), cohort("b", train="y", val="n")])


def test_only_devices_that_are_there_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_device("cpu") == "cpu"
    for name in ("", "gpu", "cuda:", "cuda:x", "meta"):
        with pytest.raises(PlanError, match="takes cpu, cuda or cuda:N"):
            require_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match="no usable CUDA GPU"):
        require_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert require_device("cuda") == "cuda"
    assert require_device("cuda:0") == "cuda:0"
    with pytest.raises(PlanError, match="finds 1 CUDA"):
        require_device("cuda:1")


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "study": "tiny",
            "task": task().model_dump(),
            "model": {"options": {"channels": [4, 8]}},
            "training": {"seed": 7},
            "evaluation": {"metrics": ["dice"], "overlap": 0.0},
        }
    )


@pytest.fixture(scope="module")
def model(plan: StudyPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    record, tensors = initial_model(plan)
    built = plan.model_copy(update={"initial": record})
    save_model(path, built, tensors, arm="initial", rounds=0)
    return path


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def patients(result: Result) -> set[str]:
    assert result.exit_code == 0, result.exception
    return {patient["patient"] for patient in json.loads(result.stdout)["patients"]}


def distinct(root: Path, count: int) -> None:
    """Images that differ, since copies under two names are errors."""
    import nibabel
    import numpy as np

    for n in range(count):
        path = root / "images" / f"s{n}.nii.gz"
        image: Any = nibabel.loadsave.load(path)
        shifted = np.asarray(image.dataobj) + np.float32(n * 0.5)
        shifted[0, 0, 0] = 1000 + n
        nibabel.nifti1.Nifti1Image(shifted, image.affine).to_filename(path)


def test_evaluate_measures_on_whom_the_study_held_back(
    plan: StudyPlan, model: Path, tmp_path: Path
) -> None:
    """Data without splits, divided by a partition for the study."""
    table = "subject,patient\n" + "".join(f"s{n},P{n}\n" for n in range(10))
    folder_of(tmp_path, *(f"s{n}" for n in range(10)), table=table)
    distinct(tmp_path, 10)
    study = read_manifest(tmp_path, plan.task, partition="iid", sites=3, seed=plan.training.seed)
    held_back = {case.patient for case in study.cases if case.split == "val"}
    assert len(held_back) == 2
    assert held_back != {
        case.patient for case in read_manifest(tmp_path, plan.task).cases if case.split == "val"
    }
    assert patients(evaluate(model, "--data", tmp_path, "--json")) == held_back
    assert len(patients(evaluate(model, "--data", tmp_path, "--split", "all", "--json"))) == 10


def test_evaluate_reads_the_chosen_alone_and_counts_the_unlabelled(
    model: Path, tmp_path: Path
) -> None:
    table = "subject,site,split,patient\ns0,a,train,P0\ns1,a,test,P1\ns2,b,test,P2\ns3,a,test,P3\n"
    folder_of(tmp_path, "s0", "s1", "s2", "s3", table=table)
    distinct(tmp_path, 4)
    (tmp_path / "labels" / "s3.nii.gz").unlink()
    (tmp_path / "images" / "s0.nii.gz").write_bytes(b"no image, and nobody looks")
    command = (model, "--data", tmp_path, "--split", "test")
    ran = evaluate(*command, "--json")
    assert patients(ran) == {"P1", "P2"}
    found = json.loads(ran.stdout)
    assert (found["unlabelled"], found["left_out"]) == (1, 0)
    assert "1 cases have no label" in evaluate(*command).stdout
    assert patients(evaluate(*command, "--site", "b", "--json")) == {"P2"}
    whole = evaluate(model, "--data", tmp_path, "--split", "all", "--json")
    assert patients(whole) == {"P1", "P2"}
    assert json.loads(whole.stdout)["left_out"] == 1
    strange = evaluate(*command, "--site", "c").exception
    assert isinstance(strange, DataError) and "they have: a, b" in str(strange)
    nobody = evaluate(model, "--data", tmp_path).exception
    assert isinstance(nobody, DataError) and "no usable labelled case" in str(nobody)
