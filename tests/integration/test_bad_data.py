"""Real broken files among healthy ones: left out, counted, and the study finishes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_studies import fedseg, tiny_plan, write_plan

from fedseg.result import StudyResult, load_result
from fedseg.simulation import simulate
from fedseg.simulation.options import Progress

NIFTI = (
    "image_without_label",
    "label_without_image",
    "lfs_pointer",
    "shape_mismatch",
    "derived_unknown_label_value",
    "derived_nan_in_image",
    "derived_affine_flip",
    "derived_4d_image",
    "derived_empty_label",
    "derived_constant_image",
    "derived_wrong_subject_label",
    "derived_truncated_gzip",
)
DICOM = (
    "derived_dicom_missing_slices",
    "derived_dicom_mixed_series",
    "dicom_rtstruct_invalid_reference",
)
UNLISTED = {"label_without_image"}  # no image, no case: the site that its row names is not told


def _add(case: str, real_data: Path, folder: Path, row: str) -> None:
    """Put one bad case into a data folder under its own name, with a row in the table."""
    source = real_data / "bad" / case
    if case in DICOM:
        shutil.copytree(source, folder / "images" / case)
        shutil.copy(
            next((folder / "labels").glob("phantom_*")), folder / "labels" / f"{case}.nii.gz"
        )
    for kind in ("images", "labels"):
        for file in source.glob(f"{kind}/*.nii.gz"):
            shutil.copyfile(file, folder / kind / f"{case}.nii.gz")
    with (folder / "sites.csv").open("a") as table:
        table.write(f"{case},{row},P-{case}\n")


@pytest.fixture
def mixed(real_data: Path, data: Path, tmp_path: Path) -> Path:
    """The phantoms with every bad case, divided among the hospitals, in both splits."""
    folder = shutil.copytree(data, tmp_path / "mixed")
    for number, case in enumerate((*NIFTI, *DICOM)):
        split = "val" if number % 3 == 0 else "train"
        _add(case, real_data, folder, f"hospital_{'abcd'[number % 4]},{split}")
    return folder


def test_broken_cases_are_left_out_and_counted(
    mixed: Path, undisturbed: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    said: list[str] = []

    def watch(progress: Progress) -> None:
        if isinstance(progress.event, str):
            said.append(progress.event)

    result = simulate(tiny_plan(), mixed, tmp_path / "out", watch=watch)
    for site in result.sites:
        names = {n for i, n in enumerate((*NIFTI, *DICOM)) if "abcd"[i % 4] == site.name[-1]}
        assert site.left_out == len(names - UNLISTED)
    assert any(text.startswith("1 cases cannot even be listed") for text in said)
    assert [site.cases for site in result.sites] == [s.cases for s in undisturbed[1].sites]
    assert result.model_digest == undisturbed[1].model_digest
    assert not any(record.failures for record in result.stages)
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '<th scope="col">Left out</th>' in html
    assert not [case for case in (*NIFTI, *DICOM) if case in html]


def test_a_hospital_with_nothing_usable_stops_nobody(
    real_data: Path, data: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(data, tmp_path / "mixed")
    for case in ("lfs_pointer", "shape_mismatch"):
        split = "train" if case == "lfs_pointer" else "val"
        _add(case, real_data, folder, f"hospital_x,{split}")
    path = write_plan(tmp_path / "study.yaml", tiny_plan(aggregation={"rounds": 2}))
    out = tmp_path / "out"
    done = fedseg("simulate", path, "--data", folder, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    result = load_result(out / "result.json")
    assert {s.name: s.left_out for s in result.sites}["hospital_x"] == 2
    failures = {(f.site, f.code) for r in result.stages if r.stage == "train" for f in r.failures}
    assert failures == {("hospital_x", "data")}
    federated = result.arm("federated")
    assert federated is not None
    assert len({p.site for p in federated.patients}) == 4


def test_nothing_but_broken_cases_is_refused(real_data: Path, tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "bad" / kind).mkdir(parents=True)
    (tmp_path / "bad" / "sites.csv").write_text("subject,site,split,patient\n")
    for number, case in enumerate(("lfs_pointer", "shape_mismatch", "derived_nan_in_image")):
        _add(case, real_data, tmp_path / "bad", f"hospital_{'abc'[number]},train")
    path = write_plan(tmp_path / "study.yaml", tiny_plan())
    done = fedseg("simulate", path, "--data", tmp_path / "bad", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "0 of 3 sites have a usable training patient, the plan needs 3" in done.stderr
    assert not (tmp_path / "out").exists()
