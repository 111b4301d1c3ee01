"""The cache of prepared cases: never stale, never trusted blindly, never readable by others."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fedseg.imaging.cache as cache_module
from fedseg.errors import DataError
from fedseg.imaging.cache import CaseCache, purge
from fedseg.imaging.cases import Case
from fedseg.imaging.phantoms import phantom_task, write_phantoms
from fedseg.imaging.transforms import PreparedCase, prepare
from fedseg.task import Task


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    return write_phantoms(folder, sites=1, patients_per_site=3, shape=(16, 20, 18), seed=3)


@pytest.fixture
def case(data: Path, tmp_path: Path) -> Case:
    """A case whose files a test may change."""
    image, label = tmp_path / "i.nii.gz", tmp_path / "l.nii.gz"
    image.write_bytes(sorted((data / "images").iterdir())[0].read_bytes())
    label.write_bytes(sorted((data / "labels").iterdir())[0].read_bytes())
    return Case("one", "p", "hospital_a", "train", (image,), label)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a case is prepared anew."""
    seen: list[int] = []

    def counted(*args: object) -> PreparedCase:
        seen.append(1)
        return prepare(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module, "prepare", counted)
    return seen


TASK = phantom_task("MR")


def same(a: PreparedCase, b: PreparedCase) -> bool:
    return (
        np.array_equal(a.image, b.image)
        and np.array_equal(a.label, b.label)
        and np.array_equal(a.affine_ras, b.affine_ras)
        and a.spacing_mm == b.spacing_mm
    )


def entry_of(root: Path) -> Path:
    (entry,) = root.glob("*.safetensors")
    return entry


def test_second_load_reads_no_scan_and_gives_the_same(
    case: Case, tmp_path: Path, reads: list[int]
) -> None:
    first = CaseCache(tmp_path / "c", TASK).load(case)
    second = CaseCache(tmp_path / "c", TASK).load(case)
    assert len(reads) == 1
    assert same(first, second)
    assert second.image.dtype == np.float32
    assert second.label is not None
    assert second.label.dtype == np.uint8


def test_a_case_without_label_stays_without(case: Case, tmp_path: Path) -> None:
    cache = CaseCache(tmp_path / "c", TASK)
    bare = replace(case, label=None)
    assert cache.load(bare).label is None
    assert cache.load(bare).label is None
    assert cache.load(case).label is not None


def test_name_patient_and_place_of_the_files_play_no_part(
    case: Case, tmp_path: Path, reads: list[int]
) -> None:
    cache = CaseCache(tmp_path / "c", TASK)
    cache.load(case)
    moved = tmp_path / "moved.nii.gz"
    moved.write_bytes(case.images[0].read_bytes())
    cache.load(replace(case, name="two", patient="q", images=(moved,)))
    assert len(reads) == 1


def test_content_label_map_and_task_each_make_another_entry(
    case: Case, tmp_path: Path, reads: list[int]
) -> None:
    root = tmp_path / "c"
    cache = CaseCache(root, TASK)
    cache.load(case)
    cache.load(case, ((0, 0), (1, 2), (2, 1)))
    coarse = Task.model_validate(TASK.model_dump() | {"spacing_mm": (2, 2, 2)})
    CaseCache(root, coarse).load(case)
    for path in (case.images[0], case.label):
        stored = nib.load(path)
        other = np.asarray(stored.dataobj).copy()
        other[0, 0, 0] ^= 1
        nib.save(nib.Nifti1Image(other, stored.affine), path)
        cache.load(case)
    assert len(reads) == len(list(root.glob("*.safetensors"))) == 5


def test_folder_and_files_are_closed_to_others_whatever_the_umask(
    case: Case, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        CaseCache(tmp_path / "c", TASK).load(case)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700
    for path in (tmp_path / "c").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(bytes(data))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def huge_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def no_digest(path: Path) -> None:
    save_file(load_file(path), path)


def label_missing(path: Path) -> None:
    arrays = load_file(path)
    del arrays["label"]
    with safe_open(path, framework="numpy") as file:
        facts = file.metadata()
    save_file(arrays, path, metadata=facts)


@pytest.mark.parametrize(
    "damage", [truncated, flipped_bit, emptied, huge_header, no_digest, label_missing]
)
def test_a_damaged_entry_is_made_again(
    damage: object, case: Case, tmp_path: Path, reads: list[int]
) -> None:
    cache = CaseCache(tmp_path / "c", TASK)
    first = cache.load(case)
    sound = entry_of(tmp_path / "c").read_bytes()
    damage(entry_of(tmp_path / "c"))  # type: ignore[operator]
    assert same(cache.load(case), first)
    assert len(reads) == 2
    assert entry_of(tmp_path / "c").read_bytes() == sound


def test_an_entry_under_another_key_is_not_taken(
    case: Case, tmp_path: Path, reads: list[int]
) -> None:
    cache = CaseCache(tmp_path / "c", TASK)
    cache.load(case)
    first = entry_of(tmp_path / "c")
    swapped = first.read_bytes()
    first.unlink()
    cache.load(case, ((0, 0), (1, 2), (2, 1)))
    entry_of(tmp_path / "c").write_bytes(swapped)
    cache.load(case, ((0, 0), (1, 2), (2, 1)))
    assert len(reads) == 3


def test_a_write_that_fails_leaves_nothing_behind(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    cache = CaseCache(tmp_path / "c", TASK)
    monkeypatch.setattr(cache_module, "save_file", full)
    with pytest.raises(DataError, match="No space left"):
        cache.load(case)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["CACHEDIR.TAG"]


def test_a_missing_file_is_a_data_error_without_its_path(case: Case, tmp_path: Path) -> None:
    case.images[0].unlink()
    with pytest.raises(DataError, match="cannot be read") as caught:
        CaseCache(tmp_path / "c", TASK).load(case)
    assert str(tmp_path) not in str(caught.value)


def test_purge_frees_every_entry_and_nothing_else(case: Case, tmp_path: Path) -> None:
    root = tmp_path / "c"
    CaseCache(root, TASK).load(case)
    size = entry_of(root).stat().st_size
    (root / "left.unfinished").write_bytes(b"12345")
    (root / "notes.txt").write_text("mine")
    assert purge(root) == size + 5
    assert sorted(p.name for p in root.iterdir()) == ["CACHEDIR.TAG", "notes.txt"]
    assert purge(root) == 0
    CaseCache(root, TASK).load(case)
    assert entry_of(root).exists()


def test_purge_refuses_what_is_no_cache_of_ours(tmp_path: Path) -> None:
    (tmp_path / "scan.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="nothing was deleted"):
        purge(tmp_path)
    (tmp_path / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n")
    with pytest.raises(DataError, match="nothing was deleted"):
        purge(tmp_path)
    with pytest.raises(DataError, match="nothing was deleted"):
        purge(tmp_path / "nowhere")
    assert (tmp_path / "scan.safetensors").exists()


def test_a_folder_with_other_things_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    mode = tmp_path.stat().st_mode
    with pytest.raises(DataError, match="empty folder"):
        CaseCache(tmp_path, TASK)
    assert tmp_path.stat().st_mode == mode
