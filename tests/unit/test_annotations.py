"""A hospital that draws only some of the labels: declared beside its data, checked, and read so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_cases import HEADER, folder_of, image, label, save, task

from fedseg.errors import DataError
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Cohort, Manifest
from fedseg.imaging.cohorts import usable_cohorts
from fedseg.imaging.fingerprint import fingerprint
from fedseg.imaging.guess import guess_task
from fedseg.imaging.label_maps import read_labels_file
from fedseg.imaging.manifests import read_manifest, survey
from fedseg.imaging.quality import inspect
from fedseg.imaging.readers import read_case

ROWS = "a,north,train,P1\nb,north,val,P2\nc,south,train,P3\n"


def folder(root: Path, declared: str, *values: tuple[str, tuple[int, ...]]) -> Path:
    """Three cases of two sites; a case's segmentation holds 1 and 2, or what `values` says."""
    folder_of(root, "a", "b", "c", table=HEADER + ROWS)
    given = dict(values)
    for number, name in enumerate("abc"):
        save(root / "images" / f"{name}.nii.gz", image() + number)
        drawn = label()
        drawn[...] = 0
        for value in given.get(name, (1, 2)):
            drawn[value, 1:3, 1 : 3 + number] = value
        save(root / "labels" / f"{name}.nii.gz", drawn)
    (root / "labels.yaml").write_text(declared)
    return root


def manifest_of(root: Path) -> Manifest:
    return read_manifest(root, task())


def test_a_declaration_holds_for_every_case_of_the_folder(tmp_path: Path) -> None:
    manifest = manifest_of(folder(tmp_path, "annotated: [PART_2]\n"))
    assert {case.annotated for case in manifest.cases} == {("part_2",)}
    assert manifest.label_map == ()
    assert manifest.cohort("south").annotated == ("part_2",)


def test_sites_of_one_folder_declare_apart_and_in_the_plans_order(tmp_path: Path) -> None:
    said = "1: part_1\n2: part_2\nannotated:\n  north: [part_2, part_1]\n  south: [part_2]\n"
    manifest = manifest_of(folder(tmp_path, said))
    found = {site: manifest.cohort(site).annotated for site in manifest.sites}
    assert found == {"north": ("part_1", "part_2"), "south": ("part_2",)}
    assert manifest.label_map == ((1, 1), (2, 2))
    both = Cohort("pooled", manifest.cases, manifest.label_map)
    assert both.annotated == ("part_1", "part_2")


def test_without_a_declaration_all_labels_count(tmp_path: Path) -> None:
    manifest = manifest_of(folder(tmp_path, "1: part_1\n2: part_2\n"))
    assert {case.annotated for case in manifest.cases} == {None}
    assert manifest.cohort("north").annotated is None


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("annotated: [liver]\n", "names liver; the study's labels are part_1, part_2"),
        ("annotated: []\n", "at least one label"),
        ("annotated: part_1\n", "at least one label"),
        ("annotated: [part_1, part_1]\n", "each once"),
        ("annotated: {north: part_1}\n", "at least one label"),
        ("annotated: {west: [part_1]}\n", "names the sites west; the data have north, south"),
        ("annotated: [part_1]\nother: [part_2]\n", "whole numbers to names"),
    ],
)
def test_a_declaration_that_cannot_be_meant_is_refused(
    tmp_path: Path, said: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        manifest_of(folder(tmp_path, said))


def test_a_label_that_is_drawn_undeclared_is_an_error_and_its_case_left_out(
    tmp_path: Path,
) -> None:
    said = "annotated: [part_1]\n"
    manifest = survey(folder(tmp_path, said, ("a", (1,)), ("c", (1,))), task())
    cohorts, inspection = usable_cohorts(manifest, task())
    (finding,) = inspection.findings
    assert (finding.case, finding.severity, finding.code) == ("b", "error", "label-undeclared")
    assert "holds part_2" in finding.problem and "part_1" in finding.problem
    assert "`annotated`" in finding.remedy and "background" in finding.remedy
    assert [case.name for case in cohorts["north"].cohort.cases] == ["a"]
    assert cohorts["north"].left_out == 1
    remedied = "1: part_1\n2: background\nannotated: [part_1]\n"
    assert inspect(survey(folder(tmp_path, remedied), task()), task()).ok


def test_a_label_that_is_declared_and_never_drawn_is_a_warning_of_its_site(tmp_path: Path) -> None:
    said = "annotated: {south: [part_1, part_2]}\n"
    (tmp_path / "one").mkdir()
    once = folder(tmp_path / "one", said, ("a", (1,)), ("b", (1,)), ("c", (1,)))
    (finding,) = inspect(survey(once, task()), task()).findings
    assert (finding.severity, finding.code) == ("warning", "label-never-seen")
    assert finding.problem.startswith("part_2 is declared as annotated at south, and none of 1 ")
    (tmp_path / "all").mkdir()
    assert inspect(survey(folder(tmp_path / "all", said, ("a", (1,))), task()), task()).ok


def test_what_is_not_annotated_is_background_wherever_the_case_is_read(tmp_path: Path) -> None:
    manifest = manifest_of(folder(tmp_path, "1: part_1\n2: part_2\n"))
    whole = manifest.cohort("south")
    partial = whole.annotated_with(["part_2"])
    (case,), (same,) = partial.cases, whole.cases
    read, truth = read_case(case, task()).label, read_case(same, task()).label
    assert read is not None and truth is not None
    assert set(np.unique(truth)) == {0, 1, 2} and set(np.unique(read)) == {0, 2}
    assert np.array_equal(read == 2, truth == 2)
    cache = CaseCache(tmp_path / "cache", task())
    for _ in range(2):  # made, then from disk
        prepared, other = (cache.load(c, manifest.label_map) for c in (case, same))
        assert prepared.annotated == ("part_2",) and other.annotated is None
        assert prepared.label is not None and not (prepared.label == 1).any()
        assert other.label is not None and (other.label == 1).any()


def test_another_declaration_is_another_fingerprint(tmp_path: Path) -> None:
    manifest = manifest_of(folder(tmp_path, "1: part_1\n2: part_2\n"))
    cohort = manifest.cohort("north")
    found = [cohort, cohort.annotated_with(["part_1"]), cohort.annotated_with(["part_1", "part_2"])]
    assert len({fingerprint([c])["north"] for c in found}) == 3
    nothing_said = replace(cohort, cases=tuple(replace(c, annotated=None) for c in cohort.cases))
    assert fingerprint([nothing_said]) == fingerprint([cohort])


def test_a_task_is_guessed_from_the_names_of_a_declaration(tmp_path: Path) -> None:
    folder(tmp_path, "1: left\n2: background\nannotated: [left, right]\n")
    assert guess_task(tmp_path).task.labels == {"left": 1, "right": 2}
    file = read_labels_file(tmp_path)
    assert file is not None and file.annotated == ("left", "right")


def test_dataset_names_must_have_the_annotated_labels_alone(tmp_path: Path) -> None:
    from fedseg.imaging.label_maps import map_from_names

    names = {"background": 0, "part_1": 5}
    assert map_from_names(names, task(), {"part_1"}) == ((5, 1),)
    assert map_from_names({"background": 0, "part_1": 1}, task(), {"part_1"}) == ()
    with pytest.raises(DataError, match=r"part_2 is not among them.*'annotated'"):
        map_from_names(names, task())
