"""Inspection: every bad case is named with its remedy, and its healthy neighbour goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_cases import HEADER, folder_of, image, label, save, task

from fedseg.imaging.cases import Case, Manifest
from fedseg.imaging.guess import guess_task
from fedseg.imaging.manifests import survey
from fedseg.imaging.quality import Inspection, inspect, usable
from fedseg.task import Task

HEALTHY = "hippocampus_001"
BAD = {
    "image_without_label": ("hippocampus_118", "label-missing", "labels/hippocampus_118.nii.gz"),
    "label_without_image": ("hippocampus_281", "image-missing", "images/hippocampus_281.nii.gz"),
    "lfs_pointer": ("liver_0", "not-nifti", "Git LFS pointer?"),
    "shape_mismatch": ("totalseg_pulmonary", "shape-mismatch", "(122, 102, 112)"),
    "derived_unknown_label_value": ("hippocampus_006", "label-unknown", "value(s) 7;"),
    "derived_nan_in_image": ("hippocampus_006", "image-nan", "27 voxels"),
    "derived_affine_flip": ("hippocampus_006", "affine-mismatch", "affines"),
    "derived_4d_image": ("hippocampus_006", "image-axes", "(35, 52, 34, 2)"),
    "derived_empty_label": ("hippocampus_006", "label-empty", "empty"),
    "derived_constant_image": ("hippocampus_006", "image-constant", "is 7"),
    "derived_wrong_subject_label": ("hippocampus_006", "shape-mismatch", "(35, 55, 32)"),
    "derived_truncated_gzip": ("hippocampus_006", "file-truncated", "image file"),
}
BAD_DICOM = {
    "derived_dicom_missing_slices": ("slices-missing", "2 slice(s) missing"),
    "derived_dicom_mixed_series": ("mixed-series", "2 series of 2 patient(s), 6 + 6 images"),
    "dicom_rtstruct_invalid_reference": ("contours-refused", "3 of the 5 images"),
}


def check(root: Path, study: Task | None = None) -> Inspection:
    return inspect(survey(root, study or task()), study or task())


def found(inspection: Inspection, case: str, code: str) -> str:
    (finding,) = [f for f in inspection.findings if (f.case, f.code) == (case, code)]
    assert finding.problem and finding.remedy
    return finding.problem + "; " + finding.remedy


def copy_healthy(real_data: Path, root: Path) -> None:
    for kind in ("images", "labels"):
        (root / kind).mkdir(exist_ok=True)
        shutil.copy(real_data / "hippocampus" / kind / f"{HEALTHY}.nii.gz", root / kind)


def test_a_healthy_cohort_is_well_and_its_table_is_right(tmp_path: Path) -> None:
    affine = np.diag([-1.0, 2.0, 5.0, 1.0])
    for n, name in enumerate("ab"):
        save(tmp_path / "images" / f"{name}.nii.gz", image() + n, affine)
        save(tmp_path / "labels" / f"{name}.nii.gz", np.roll(label(), n, 0), affine)
    (tmp_path / "sites.csv").write_text(HEADER + "a,x,train,P1\nb,x,train,P1\n")
    study = task().model_copy(update={"spacing_mm": (1.0, 2.0, 5.0)})
    inspection = check(tmp_path, study)
    assert inspection.ok and not usable(inspection)
    assert (inspection.cases, inspection.patients) == (2, 1)
    row = inspection.table[0]
    assert (row.shape, row.spacing_mm) == ((5, 6, 7), (1.0, 2.0, 5.0))
    assert row.intensity[0][1] == pytest.approx(104.5)
    assert row.label_ml == {"part_1": 0.01, "part_2": 0.01}
    value = json.loads(inspection.to_json())
    assert value["format"] == "fedseg-check/1" and value["ok"] and len(value["table"]) == 2


@pytest.mark.parametrize("folder", BAD)
def test_every_bad_case_is_named_and_its_neighbour_goes_on(
    real_data: Path, tmp_path: Path, folder: str
) -> None:
    case, code, text = BAD[folder]
    root = tmp_path / "data"
    shutil.copytree(real_data / "bad" / folder, root)
    copy_healthy(real_data, root)
    manifest = survey(root, task())
    inspection = inspect(manifest, task())
    assert text in found(inspection, case, code)
    assert HEALTHY in {row.case for row in inspection.table}
    assert HEALTHY not in {f.case for f in inspection.findings}
    left = {c.name for c in manifest.cohort("").without(usable(inspection)).cases}
    assert left == ({HEALTHY, case} if code == "label-empty" else {HEALTHY})
    assert not inspection.ok


@pytest.mark.parametrize("folder", BAD_DICOM)
def test_every_bad_series_is_named_and_its_neighbour_goes_on(
    real_data: Path, tmp_path: Path, folder: str
) -> None:
    code, text = BAD_DICOM[folder]
    shutil.copytree(real_data / "bad" / folder, tmp_path / "bad")
    shutil.copytree(real_data / "dicom" / "ct_with_seg" / "CT", tmp_path / "good" / "ct")
    shutil.copy(real_data / "dicom" / "ct_with_seg" / "SEG" / "liver.dcm", tmp_path / "good")
    guess = guess_task(tmp_path)
    assert list(guess.task.labels) == ["Liver"]
    inspection = check(tmp_path, guess.task)
    shown = "; ".join(f.problem for f in inspection.findings if (f.case, f.code) == ("bad", code))
    assert text in shown
    assert "bad" in usable(inspection) and "good/ct" not in usable(inspection)
    readable = {row.case: row.label_ml for row in inspection.table}
    assert readable["good/ct"] == {"Liver": pytest.approx(70.36, abs=0.01)}
    assert ("bad" in readable) == (code == "contours-refused")


def test_a_label_without_image_shows_its_odd_grid(real_data: Path) -> None:
    inspection = check(real_data / "bad" / "label_without_image")
    assert "512 x 512 x 94" in found(inspection, "hippocampus_281", "grid-odd")


def test_the_same_image_under_two_patients_leaves_both_out(tmp_path: Path) -> None:
    table = HEADER + "a,x,train,P1\nb,x,train,P2\nc,x,train,P3\nd,x,train,P3\n"
    folder_of(tmp_path, "a", "b", table=table)
    for n, name in enumerate("cd"):
        save(tmp_path / "images" / f"{name}.nii.gz", image() + 1)
        save(tmp_path / "labels" / f"{name}.nii.gz", np.roll(label(), n + 1, 1))
    inspection = check(tmp_path)
    assert "another patient" in found(inspection, "a", "image-copied")
    assert "same patient" in found(inspection, "d", "image-copied")
    assert usable(inspection) == {"a", "b"}


def test_the_same_label_on_two_patients_is_a_warning(tmp_path: Path) -> None:
    folder_of(tmp_path, "a", "b", table=HEADER + "a,x,train,P1\nb,x,train,P2\n")
    save(tmp_path / "images" / "b.nii.gz", image() + 1)
    inspection = check(tmp_path)
    assert {f.code for f in inspection.findings} == {"label-copied"} and not usable(inspection)


def test_odd_grids_and_mixed_modalities_are_warnings(tmp_path: Path) -> None:
    folder_of(tmp_path, table=HEADER + "".join(f"{n},x,train,{n}\n" for n in "abcd"))
    for n, name in enumerate("abcd"):
        affine = np.diag([8.0, 8, 8, 1]) if name == "d" else np.eye(4)
        shift = -1000 if name == "c" else n
        save(tmp_path / "images" / f"{name}.nii.gz", np.round(10 * image() + shift), affine)
        save(tmp_path / "labels" / f"{name}.nii.gz", np.roll(label(), n, 2), affine)
    inspection = check(tmp_path)
    assert {(f.case, f.code) for f in inspection.findings} == {
        ("c", "looks-like-ct"), ("d", "grid-odd"), ("d", "grid-apart"),
    }  # fmt: skip
    ct = task().model_copy(
        update={"channels": (task().channels[0].model_copy(update={"modality": "CT"}),)}
    )
    codes = {(f.case, f.code) for f in check(tmp_path, ct).findings}
    assert {("a", "not-hu"), ("b", "not-hu"), ("d", "not-hu")} <= codes
    assert ("c", "not-hu") not in codes


def test_nothing_crashes_the_inspection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, "a", "b", table=HEADER + "a,x,train,P1\nb,x,train,P2\n")
    save(tmp_path / "images" / "b.nii.gz", image() + 1)
    save(tmp_path / "labels" / "b.nii.gz", np.roll(label(), 1, 0))
    real = survey(tmp_path, task())
    import fedseg.imaging.quality as quality

    read = quality.read_case

    def burning(case: Case, *args: object) -> object:
        if case.name == "a":
            raise RuntimeError("out of the blue")
        return read(case, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(quality, "read_case", burning)
    inspection = inspect(real, task())
    assert "RuntimeError" in found(inspection, "a", "unexpected")
    assert [row.case for row in inspection.table] == ["b"]


def test_a_plain_manifest_reports_a_case_without_label(tmp_path: Path) -> None:
    path = save(tmp_path / "i.nii.gz", image())
    case = Case("a", "P1", "", "train", (path,), None)
    inspection = inspect(Manifest(tmp_path, (case,)), task())
    assert usable(inspection) == {"a"}
    unlabelled = Manifest(tmp_path, (replace(case, split="test"),))
    assert not usable(inspect(unlabelled, task()))


def test_guessing_names_channels_labels_and_a_lone_value(tmp_path: Path) -> None:
    for n in range(5):
        save(tmp_path / "images" / f"s{n}_0000.nii.gz", image() - 600)
        save(tmp_path / "images" / f"s{n}_0001.nii.gz", image() + n)
        odd = label() * (7 if n == 3 else 1)
        save(tmp_path / "labels" / f"s{n}.nii.gz", np.where(odd == 14, 2, odd))
    guess = guess_task(tmp_path)
    assert [c.modality for c in guess.task.channels] == ["CT", "CT"]
    assert list(guess.task.labels) == ["value_1", "value_2"] and not guess.findings
    assert "7" in found(check(tmp_path, guess.task), "s3", "label-unknown")
    (tmp_path / "labels.yaml").write_text("1: liver\n2: tumour\n7: background\n")
    named = guess_task(tmp_path)
    assert named.task.labels == {"liver": 1, "tumour": 2}
    assert survey(tmp_path, named.task).label_map == ((1, 1), (2, 2), (7, 0))


def test_guessing_says_where_values_have_holes(real_data: Path) -> None:
    guess = guess_task(real_data / "bad" / "derived_unknown_label_value")
    assert guess.label_map == ((1, 1), (7, 2))
    assert "7 occur, but not 2, 3, 4, 5, 6" in guess.findings[0].problem


def test_the_real_hippocampus_cohort_is_well(real_data: Path) -> None:
    inspection = check(real_data / "hippocampus")
    assert inspection.ok and (inspection.cases, inspection.patients) == (200, 131)


def test_a_table_of_dicom_series_with_segment_numbers(real_data: Path, tmp_path: Path) -> None:
    shutil.copytree(real_data / "dicom" / "ct_with_seg", tmp_path, dirs_exist_ok=True)
    shutil.copytree(real_data / "dicom" / "ct_jpeg2000", tmp_path / "j2k")
    (tmp_path / "sites.csv").write_text(
        "subject,site,split,patient,image,label\n"
        "one,x,train,P1,CT,SEG/partial_overlaps.dcm\n"
        "two,x,val,P2,j2k/CT,j2k/example_seg_dicom.nii.gz\n"
    )
    rest = "".join(f"{n}: background\n" for n in range(2, 118))
    (tmp_path / "labels.yaml").write_text("1: organ\n" + rest)
    guess = guess_task(tmp_path)
    assert guess.task.labels == {"organ": 1} and guess.task.channels[0].modality == "CT"
    inspection = check(tmp_path, guess.task)
    assert inspection.ok
    shapes = {row.case: (row.shape, row.spacing_mm[2]) for row in inspection.table}
    assert shapes == {"one": ((512, 512, 3), 1.0), "two": ((512, 512, 20), 2.0)}
