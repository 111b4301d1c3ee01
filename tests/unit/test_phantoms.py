"""Phantoms: the same bytes each time, geometry that holds, and hospitals that truly differ."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fedseg.imaging.cases import Case
from fedseg.imaging.phantoms import phantom_task, write_phantoms
from fedseg.imaging.readers import read_case
from fedseg.imaging.transforms import PreparedCase, prepare, restore

SMALL = (20, 24, 20)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "sites.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def prepared_of(folder: Path, modality: str) -> dict[str, PreparedCase]:
    task = phantom_task(modality)  # type: ignore[arg-type]
    cases = {}
    for row in rows_of(folder):
        image, label = (folder / n / f"{row['subject']}.nii.gz" for n in ("images", "labels"))
        case = Case(row["subject"], row["patient"], row["site"], "train", (image,), label)
        cases[case.name] = prepare(read_case(case, task), task)
    return cases


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_equal_arguments_give_equal_bytes(tmp_path: Path, modality: str) -> None:
    for name in ("one", "two"):
        write_phantoms(
            tmp_path / name, sites=5, patients_per_site=3, shape=SMALL, modality=modality
        )
    write_phantoms(
        tmp_path / "other", sites=5, patients_per_site=3, shape=SMALL, modality=modality, seed=1
    )
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    one, other = digests(tmp_path / "one"), digests(tmp_path / "other")
    assert not {one[name] for name in one if "nii" in name} & set(other.values())


def test_more_patients_and_sites_leave_the_others_as_they_were(tmp_path: Path) -> None:
    few = digests(write_phantoms(tmp_path / "few", sites=1, patients_per_site=[3], shape=SMALL))
    many = digests(write_phantoms(tmp_path / "m", sites=2, patients_per_site=[4, 3], shape=SMALL))
    assert {k: v for k, v in few.items() if "nii" in k}.items() <= many.items()


def test_a_quarter_of_the_patients_and_two_at_least_are_val(tmp_path: Path) -> None:
    folder = write_phantoms(
        tmp_path, sites=2, patients_per_site=(3, 12), cases_per_patient=2, shape=(16, 16, 16)
    )
    splits = {(r["site"], r["patient"]): r["split"] for r in rows_of(folder)}
    counts = Counter((site, split) for (site, _), split in splits.items())
    assert counts == {
        ("hospital_a", "train"): 1,
        ("hospital_a", "val"): 2,
        ("hospital_b", "train"): 9,
        ("hospital_b", "val"): 3,
    }
    assert len(rows_of(folder)) == 2 * 15
    assert len({(r["patient"], r["split"]) for r in rows_of(folder)}) == 15


def test_hospitals_have_many_or_few_patients() -> None:
    from fedseg.imaging.phantoms import _patients

    assert _patients(5, 8) == [8, 5, 10, 8, 6]


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_every_case_reads_prepares_and_holds_both_labels(tmp_path: Path, modality: str) -> None:
    folder = write_phantoms(tmp_path, patients_per_site=3, modality=modality)
    cases = prepared_of(folder, modality)
    assert len(cases) == 16
    for case in cases.values():
        assert case.image.shape == (1, 40, 48, 40)
        assert case.spacing_mm == pytest.approx((1, 1, 1))
        head, body = np.bincount(case.label.ravel(), minlength=3)[1:]
        assert 300 < body < head < 6000
        ahead = np.argwhere(case.label == 1).mean(0)[1] - np.argwhere(case.label == 2).mean(0)[1]
        assert ahead > 5  # the head is anterior, whatever way the file is stored


def test_files_differ_in_axes_type_spacing_and_scale(tmp_path: Path) -> None:
    folder = write_phantoms(tmp_path, patients_per_site=3, shape=SMALL)
    images = [nib.load(folder / "images" / f"phantom_{letter}01.nii.gz") for letter in "abcde"]
    labels = [nib.load(folder / "labels" / f"phantom_{letter}01.nii.gz") for letter in "abcde"]
    assert ["".join(nib.aff2axcodes(i.affine)) for i in images] == [
        "RAS", "LPS", "LAS", "PSR", "RAS",
    ]  # fmt: skip
    assert [i.get_data_dtype().name for i in images] == [
        "uint8",
        *["int16", "float32"],
        *["int16"] * 2,
    ]
    assert images[4].header.get_zooms()[2] == pytest.approx(1.25)
    assert images[2].get_fdata().max() > 1e4
    for image, label in zip(images, labels, strict=True):
        np.testing.assert_array_equal(image.affine, label.affine)
        assert label.get_data_dtype() == np.uint8


def test_head_and_body_are_told_apart_by_shape_alone(tmp_path: Path) -> None:
    for case in prepared_of(write_phantoms(tmp_path, patients_per_site=3), "MR").values():
        head, body, rest = (case.image[0][case.label == value].mean() for value in (1, 2, 0))
        assert abs(head - body) < 0.6 * abs(head - rest)


def test_hospitals_scan_with_other_contrasts(tmp_path: Path) -> None:
    bright: Counter[str] = Counter()
    for name, case in prepared_of(write_phantoms(tmp_path), "MR").items():
        bright[name[8]] += case.image[0][case.label > 0].mean() > 0
    assert bright["d"] > bright["a"] == 0
    assert 4 < bright.total() < 19


def test_a_mask_goes_back_to_each_hospital_s_own_grid(tmp_path: Path) -> None:
    folder = write_phantoms(tmp_path, patients_per_site=3)
    for name, case in prepared_of(folder, "MR").items():
        stored = nib.load(folder / "labels" / f"{name}.nii.gz")
        truth = np.asarray(stored.dataobj)
        back = restore(case.label, case, truth.shape, stored.affine)
        same = 2 * ((back > 0) & (truth > 0)).sum() / ((back > 0).sum() + (truth > 0).sum())
        assert same == 1 or (name[8] == "e" and same > 0.95)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sites": 0},
        {"sites": 27},
        {"sites": 2, "patients_per_site": [3]},
        {"sites": 1, "patients_per_site": [2]},
        {"shape": (8, 20, 20)},
        {"cases_per_patient": 0},
        {"seed": -1},
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=r"sites must|shape needs"):
        write_phantoms(tmp_path / "x", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
