"""From folder to manifest: every layout, and every way a table can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cases import HEADER, folder_of, image, label, save, task

from fedseg.errors import DataError
from fedseg.imaging.manifests import read_manifest, survey
from fedseg.imaging.partition import assign_sites, assign_splits, parse_partition


def codes(root: Path) -> set[tuple[str, str]]:
    return {(f.case, f.code) for f in survey(root, task()).findings}


def names(root: Path) -> list[str]:
    return [case.name for case in survey(root, task()).cases]


def test_a_table_gives_patient_site_and_split(tmp_path: Path) -> None:
    rows = "a,north,train,P1\nb,north,train,P1\nc,south,val,P2\n"
    manifest = read_manifest(folder_of(tmp_path, "a", "b", "c", table=HEADER + rows), task())
    assert manifest.sites == ("north", "south") and not manifest.findings
    assert manifest.cohort("north").patients == ("P1",)
    case = manifest.cases[2]
    assert (case.name, case.split, case.images, case.label) == (
        "c", "val", (tmp_path / "images/c.nii.gz",), tmp_path / "labels/c.nii.gz"
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        HEADER + "a,x,train,P1\n",
        "\ufeffSubject;Site;Split;Patient\r\n a ;x;Train;P1\r\n\r\n",
        'subject\tsite\tsplit\tpatient\tnote\n"a"\tx\ttrain\tP1\thello, you; there\n',
        "patient,split,site,subject\nP1,train,x,a\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_odd_separators_marks_and_encodings_read_alike(
    tmp_path: Path, text: str, encoding: str
) -> None:
    folder_of(tmp_path, "a")
    (tmp_path / "sites.csv").write_bytes(text.encode(encoding))
    manifest = read_manifest(tmp_path, task())
    assert [(c.name, c.site, c.split, c.patient) for c in manifest.cases] == [
        ("a", "x", "train", "P1")
    ]
    assert not manifest.findings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (HEADER.encode(), "no rows"),
        (b"PK\x03\x04rest", "binary.*save it as CSV"),
        (b"subject,\x00\x01\x02", "binary.*save it as CSV"),
        ("subject,site\nJürgen,x\n".encode("latin-1"), "not utf-8-sig text"),
        (b"name,site,split,patient\na,x,train,P1\n", "column subject is missing.*'name'"),
        (b"subject|site|split\na|x|train\n", "column subject is missing.*separated by comma"),
        (b"subject,site,site\na,x,y\n", "column site occurs twice"),
        (b'subject,site\n"a,x\n', "not a CSV.*quotes"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_the_remedy(
    tmp_path: Path, content: bytes, message: str
) -> None:
    folder_of(tmp_path, "a")
    (tmp_path / "sites.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path, task())


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200) | st.text('subject,ite\n"; x\t../', max_size=80))
def test_no_table_crashes_the_survey(
    tmp_path_factory: pytest.TempPathFactory, content: bytes | str
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    data = content if isinstance(content, bytes) else f"subject,split\n{content}".encode()
    (root / "sites.csv").write_bytes(data)
    try:
        survey(root, task())
    except DataError as error:
        assert "sites.csv" in str(error)


def test_a_missing_table_or_folder_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "a", table=HEADER + "a,x,train,P1\n")
    with pytest.raises(DataError, match=r"cannot read the table other\.csv"):
        read_manifest(tmp_path, task(), table="other.csv")
    with pytest.raises(DataError, match="leaves the data folder"):
        read_manifest(tmp_path, task(), table="../sites.csv")
    with pytest.raises(DataError, match="does not exist"):
        read_manifest(tmp_path / "gone", task())
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="holds no cases"):
        read_manifest(tmp_path / "void", task())


@pytest.mark.parametrize(
    ("rows", "bad", "code", "good"),
    [
        ("b,x,train,P2\nb,x,train,P2\n", "b", "row-duplicate", ["a", "b"]),
        ("b,x,train,P2\nb,x,val,P2\n", "b", "row-duplicate", ["a"]),
        ("b,x,train,P2\nc,x,val,P2\n", "c", "patient-in-two-splits", ["a"]),
        ("b,x,train,P2\nc,y,train,P2\n", "b", "patient-in-two-sites", ["a"]),
        ("b,x,training,P2\n", "b", "row-split", ["a"]),
        ("b,,train,P2\n", "b", "row-site", ["a"]),
        ("b,north wing,train,P2\n", "b", "row-site", ["a"]),
        ("b,x,train,\n", "b", "row-patient", ["a"]),
        ("b,x,train\n", "b", "row-cells", ["a"]),
        ("b,x,train,P2,more\n", "b", "row-cells", ["a"]),
        (",x,train,P2\n", "", "row-subject", ["a"]),
        ("../b,x,train,P2\n", "../b", "path-outside", ["a"]),
        ("/etc/b,x,train,P2\n", "/etc/b", "path-outside", ["a"]),
        ("gone,x,train,P2\n", "gone", "image-missing", ["a"]),
        (250 * "b" + ",x,train,P2\n", 250 * "b", "path-unusable", ["a"]),
    ],
)
def test_a_bad_row_is_named_and_the_others_go_on(
    tmp_path: Path, rows: str, bad: str, code: str, good: list[str]
) -> None:
    folder_of(tmp_path, "a", "b", "c", table=HEADER + "a,x,train,P1\n" + rows)
    assert (bad, code) in codes(tmp_path)
    assert names(tmp_path) == good
    assert len(read_manifest(tmp_path, task()).cases) == len(good)
    found = next(f for f in survey(tmp_path, task()).findings if f.code == code)
    assert "row" in found.problem and found.remedy


def test_paths_that_leave_the_folder_through_links_are_refused(tmp_path: Path) -> None:
    outside = save(tmp_path / "outside" / "b.nii.gz", image())
    root = folder_of(tmp_path / "data", "a", table=HEADER + "a,x,train,P1\nb,x,train,P2\n")
    (root / "images" / "b.nii.gz").symlink_to(outside)
    assert ("b", "path-outside") in codes(root) and names(root) == ["a"]


def test_image_and_label_columns_name_files_inside_only(tmp_path: Path) -> None:
    folder_of(tmp_path, "a", "b")
    (tmp_path / "sites.csv").write_text(
        "subject,site,split,patient,image,label\n"
        "one,x,train,P1,images/a.nii.gz,labels/a.nii.gz\n"
        "two,x,train,P2,../images/b.nii.gz,labels/b.nii.gz\n"
        "three,x,train,P3,images/a.nii.gz,labels/b.nii.gz\n"
        "four,x,train,P4,images/b.nii.gz,labels/gone.nii.gz\n"
    )
    assert names(tmp_path) == ["four"]
    assert codes(tmp_path) == {
        ("one", "image-shared"), ("three", "image-shared"), ("two", "path-outside"),
        ("four", "label-missing"),
    }  # fmt: skip


def test_stray_files_and_missing_labels_are_named(tmp_path: Path) -> None:
    folder_of(tmp_path, "a", "b", "c", table=HEADER + "a,x,train,P1\nb,x,train,P2\n")
    (tmp_path / "labels" / "b.nii.gz").unlink()
    assert codes(tmp_path) == {("b", "label-missing"), ("c", "file-unlisted")}
    assert names(tmp_path) == ["a", "b"]


def test_a_plain_folder_is_read_with_a_warning(tmp_path: Path) -> None:
    folder_of(tmp_path, *"abcdefghij")
    (tmp_path / "labels" / "b.nii.gz").unlink()
    (tmp_path / "images" / "c.nii.gz").unlink()
    assert codes(tmp_path) == {("", "no-table"), ("b", "label-missing"), ("c", "image-missing")}
    manifest = read_manifest(tmp_path, task())
    assert [c.split for c in manifest.cases].count("val") == 2
    assert [name for name, _ in manifest.orphans] == ["c"]


def test_decathlon_labels_are_matched_by_name(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / "imagesTr" / f"{name}.nii.gz", image())
        save(tmp_path / "labelsTr" / f"{name}.nii.gz", label())
    data = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Part_2", "2": "Part_1"},
        "training": [
            {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "abc"
        ],
        "test": ["./imagesTs/z.nii.gz"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(data))
    manifest = read_manifest(tmp_path, task())
    assert [c.name for c in manifest.cases] == ["a", "b"]
    assert manifest.label_map == ((1, 2), (2, 1))
    assert ("c", "image-missing") in codes(tmp_path)
    (tmp_path / "labels.yaml").write_text("1: part_1\n2: background\n")
    assert read_manifest(tmp_path, task()).label_map == ((1, 1), (2, 0))
    (tmp_path / "labels.yaml").write_text("1: liver\n")
    with pytest.raises(DataError, match="names liver; the study's labels are part_1, part_2"):
        read_manifest(tmp_path, task())
    (tmp_path / "labels.yaml").write_text("- 1\n")
    with pytest.raises(DataError, match="whole numbers to names"):
        read_manifest(tmp_path, task())
    (tmp_path / "labels.yaml").unlink()
    with pytest.raises(DataError, match="part_3 is not among them"):
        read_manifest(tmp_path, task(labels=3))
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not a JSON object"):
        read_manifest(tmp_path, task())


def test_nnunet_channels_follow_the_order_of_the_plan(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for channel in range(2):
            save(tmp_path / "imagesTr" / f"{name}_{channel:04d}.nii.gz", image())
        save(tmp_path / "labelsTr" / f"{name}.nii.gz", label())
    (tmp_path / "imagesTr" / "b_0001.nii.gz").unlink()
    data = {
        "channel_names": {"0": "t1", "1": "T0"},
        "labels": {"background": 0, "part_1": 1, "part_2": 2},
        "file_ending": ".nii.gz",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(data))
    manifest = read_manifest(tmp_path, task(channels=2))
    assert [path.name for path in manifest.cases[0].images] == ["a_0001.nii.gz", "a_0000.nii.gz"]
    assert manifest.label_map == ()
    assert {(f.case, f.code) for f in manifest.findings} >= {("b", "image-missing")}
    with pytest.raises(DataError, match=r"2 channel\(s\).*the plan 1"):
        read_manifest(tmp_path, task())


def test_channels_by_file_name_or_by_column_must_be_as_many_as_the_plan_has(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000"):
        save(tmp_path / "images" / f"{name}.nii.gz", image())
    for name in "ab":
        save(tmp_path / "labels" / f"{name}.nii.gz", label())
    (tmp_path / "sites.csv").write_text(HEADER + "a,x,train,P1\nb,x,train,P2\n")
    assert codes(tmp_path) == {("a", "channel-count")} and names(tmp_path) == ["b"]
    two = survey(tmp_path, task(channels=2))
    assert [len(case.images) for case in two.cases] == [2]
    assert [(f.case, f.code) for f in two.findings] == [("b", "image-missing")]
    (tmp_path / "sites.csv").write_text(
        "subject,image,label\na,images/a_0001.nii.gz | images/a_0000.nii.gz,labels/a.nii.gz\n"
    )
    (case,) = read_manifest(tmp_path, task(channels=2)).cases
    assert [path.name for path in case.images] == ["a_0001.nii.gz", "a_0000.nii.gz"]


def test_a_partition_is_by_patient_and_repeats(tmp_path: Path) -> None:
    rows = "".join(f"s{n},,,P{n // 2}\n" for n in range(20))
    folder_of(tmp_path, *(f"s{n}" for n in range(20)), table=HEADER + rows)
    assert read_manifest(tmp_path, task()).sites == ("",)
    for partition in ("iid", "dirichlet:0.5"):
        one = read_manifest(tmp_path, task(), partition=partition, sites=3, seed=7)
        assert one == read_manifest(tmp_path, task(), partition=partition, sites=3, seed=7)
        assert one.sites == ("site_1", "site_2", "site_3")
        for patient in {case.patient for case in one.cases}:
            own = {(c.site, c.split) for c in one.cases if c.patient == patient}
            assert len(own) == 1
    assert one != read_manifest(tmp_path, task(), partition="dirichlet:0.5", sites=3, seed=8)
    with pytest.raises(DataError, match="10 patients cannot make 11 sites"):
        read_manifest(tmp_path, task(), partition="iid", sites=11)


@pytest.mark.parametrize("text", ["", "uniform", "dirichlet", "dirichlet:0", "dirichlet:nan"])
def test_an_unknown_partition_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"iid, or dirichlet:ALPHA"):
        parse_partition(text)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.dictionaries(st.text(min_size=1, max_size=6), st.floats(0, 100), min_size=4),
    alpha=st.floats(0.01, 100),
    sites=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_patient_gets_a_site_and_no_site_is_empty(
    sizes: dict[str, float], alpha: float, sites: int, seed: int
) -> None:
    given_ = assign_sites(sizes, f"dirichlet:{alpha}", sites, seed)
    turned = dict(reversed(list(sizes.items())))
    assert given_ == assign_sites(turned, f"dirichlet:{alpha}", sites, seed)
    assert set(given_) == set(sizes) and len(set(given_.values())) == sites


@settings(max_examples=30, deadline=None)
@given(
    patients=st.sets(st.text(min_size=1, max_size=6), max_size=30),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_fifth_of_the_patients_is_held_back(patients: set[str], seed: int) -> None:
    splits = assign_splits(sorted(patients), seed)
    assert splits == assign_splits([*sorted(patients, reverse=True), *patients], seed)
    assert set(splits) == patients
    held = list(splits.values()).count("val")
    assert held == (max(round(0.2 * len(patients)), 1) if len(patients) > 1 else 0)


def test_the_split_depends_on_patients_and_seed_but_on_no_site(tmp_path: Path) -> None:
    """What a study held back under a partition is held back without one, or with other sites."""
    names = [f"s{n}" for n in range(20)]

    def held_back(table: str, **options: Any) -> set[str]:
        (tmp_path / "sites.csv").write_text(table)
        manifest = read_manifest(tmp_path, task(), **options)
        return {case.patient for case in manifest.cases if case.split == "val"}

    folder_of(tmp_path, *names)
    plain = "subject,patient\n" + "".join(f"{name},P{name}\n" for name in names)
    sited = "subject,site,patient\n" + "".join(
        f"{name},{'ab'[n % 2]},P{name}\n" for n, name in enumerate(names)
    )
    found = held_back(plain, seed=7)
    assert len(found) == 4
    assert found == held_back(plain, seed=7, partition="iid", sites=3)
    assert found == held_back(plain, seed=7, partition="dirichlet:0.5", sites=4)
    assert found == held_back(sited, seed=7)
    assert found == held_back(sited, seed=7, partition="iid", sites=2)
    astray = sited.replace("s0,a", "s0,???")
    assert held_back(astray, seed=7) == found - {"Ps0"}
    assert found != held_back(plain, seed=8)


def test_iid_deals_evenly_and_a_small_alpha_does_not() -> None:
    sizes = {f"P{n}": float(n) for n in range(50)}

    def counts(partition: str) -> list[int]:
        sites = list(assign_sites(sizes, partition, 5, 0).values())
        return sorted(sites.count(site) for site in set(sites))

    assert counts("iid") == [10] * 5
    assert max(counts("dirichlet:0.1")) > 15
    assert max(counts("dirichlet:1000")) < 13


def test_the_real_tables_read_without_a_finding(real_data: Path) -> None:
    for table in (None, "sites_iid.csv"):
        manifest = read_manifest(real_data / "hippocampus", task(), table=table)
        assert len(manifest.cases) == 200 and len(manifest.sites) == 5
        assert len({case.patient for case in manifest.cases}) == 131
        assert not manifest.findings
