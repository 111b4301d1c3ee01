"""A file is there whole or not at all, and the folders that hold it are safe too."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fedseg.durable import make_folder, whole, write_atomically
from fedseg.errors import StorageError


def test_a_file_appears_with_its_bytes_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with whole(path) as file:
        file.write(b"first")
        file.seek(0)
        assert file.read() == b"first"
        assert not path.exists()
    assert path.read_bytes() == b"first"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_error_in_the_block_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="half way"), whole(path) as file:
        file.write(b"new")
        raise ValueError("half way")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_folder_that_is_made_is_synced_into_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    make_folder(tmp_path / "a" / "b" / "c", mode=0o700)
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")} == {0o700}
    synced.clear()
    make_folder(tmp_path / "a" / "b")
    assert not synced
    write_atomically(tmp_path / "a" / "note", b"x")
    assert synced == [str(tmp_path / "a" / "note.part"), str(tmp_path / "a")]


def test_a_file_in_the_way_of_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write note"):
        write_atomically(tmp_path / "a" / "b" / "note", b"x")
