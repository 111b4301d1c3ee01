"""A site's folder: its names, its modes, and files that are whole or not there."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_parties import Party
from small_sites import allow, data_of, member
from typer.testing import CliRunner

from fedseg.errors import DataError, StorageError
from sites import cli
from sites.cohort import choose_cohort
from sites.folder import Link, SiteFolder, SiteRecord
from sites.notes import read_note, write_note
from sites.rights import make_folder


def test_a_study_cannot_be_named_out_of_its_folder(tmp_path: Path) -> None:
    folder = SiteFolder(tmp_path)
    for name in ("../x", "a/b", "", ".", "..", "A", "x" * 65, "a\n"):
        with pytest.raises(DataError, match="small letters"):
            folder.study(name)
        with pytest.raises(DataError, match="small letters"):
            folder.relay_of(name)
        with pytest.raises(DataError, match="small letters"):
            folder.model(name)


def test_a_folder_without_site_json_is_no_site(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fedseg-site init"):
        SiteFolder(tmp_path).record  # noqa: B018


def test_private_folders_and_files_are_the_owners_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        one = member(tmp_path)
        one.join()
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(one.folder.path)): stat.S_IMODE(path.stat().st_mode)
        for path in one.folder.path.rglob("*")
    }
    open_to_others = {name for name, mode in modes.items() if mode & 0o007}
    assert open_to_others == {
        *("site.json", "request.json", "policy.yaml"),
        *("relay/node.pub", "relay/tiny/ca.crt"),
    }
    keys = ("trainer/signing.key", "trainer/receiving.key", "relay/node.key")
    assert {modes[name] for name in keys} == {0o600}
    own = ("trainer", "relay", "studies", "cache", "models", "validations")
    assert {modes[name] for name in own} == {0o700}


def test_a_wider_folder_is_narrowed_and_a_narrower_one_left(tmp_path: Path) -> None:
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    wide.mkdir()
    wide.chmod(0o755)
    narrow.mkdir()
    narrow.chmod(0o500)
    make_folder(wide)
    make_folder(narrow, 0o750)
    assert stat.S_IMODE(wide.stat().st_mode) == 0o700
    assert stat.S_IMODE(narrow.stat().st_mode) == 0o500


def test_a_note_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "site.json"
    write_note(path, SiteRecord(name="a", created="now"))
    before = path.read_bytes()
    (tmp_path / "site.json.part").mkdir()  # so that the draft cannot be written
    with pytest.raises(StorageError):
        write_note(path, SiteRecord(name="b", created="now"))
    assert path.read_bytes() == before


def test_a_damaged_note_names_the_file_and_not_its_content(tmp_path: Path) -> None:
    path = tmp_path / "site.json"
    path.write_text('{"name": "secret thing", "created": "now"}')
    with pytest.raises(DataError, match=r"site\.json is damaged") as caught:
        read_note(path, SiteRecord)
    assert "secret" not in str(caught.value)


def test_a_link_gives_the_trainers_socket_as_an_absolute_path(tmp_path: Path) -> None:
    folder = SiteFolder(tmp_path)
    for trainer, found in (
        ("unix:run/trainer.sock", f"unix:{folder.socket}"),
        ("unix:/run/fedseg.sock", "unix:/run/fedseg.sock"),
        ("127.0.0.1:9000", "127.0.0.1:9000"),
    ):
        link = Link(study="tiny", address="h:443", trainer=trainer, port=20000)
        write_note(folder.link("tiny"), link)
        assert folder.link_of("tiny").trainer == found


TRAINER, RELAY = 65533, 65534


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that other users can reach, which pytest's own is not."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as others")
    with tempfile.TemporaryDirectory(prefix="fedseg-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_root_writes_as_the_owner_of_the_folder_and_through_no_link(reachable: Path) -> None:
    theirs, ours = reachable / "theirs", reachable / "ours"
    theirs.mkdir()
    os.chown(theirs, RELAY, RELAY)
    ours.write_text("precious")
    (theirs / "link.json.part").symlink_to(ours)
    with pytest.raises(StorageError):
        write_note(theirs / "link.json", b"evil")
    assert ours.read_text() == "precious"
    write_note(theirs / "other.json", b"fine")
    made = make_folder(theirs / "study")
    assert (theirs / "other.json").stat().st_uid == made.stat().st_uid == RELAY
    assert os.geteuid() == 0


def test_root_follows_no_link_that_another_user_laid_in_place_of_a_folder(reachable: Path) -> None:
    ours, theirs = reachable / "ours", reachable / "theirs"
    ours.mkdir(mode=0o700)
    theirs.mkdir()
    (theirs / "tiny").symlink_to(ours)
    for path in (theirs, theirs / "tiny"):
        os.chown(path, RELAY, RELAY, follow_symlinks=False)
    with pytest.raises(StorageError):
        write_note(theirs / "tiny" / "ca.crt", b"evil")
    assert list(ours.iterdir()) == []
    moved = reachable / "moved"  # what root itself has moved elsewhere is still its owner's
    moved.symlink_to(theirs)
    write_note(moved / "other.json", b"fine")
    assert (theirs / "other.json").stat().st_uid == RELAY


def test_relay_and_trainer_of_two_users_get_what_is_theirs_when_root_joins(reachable: Path) -> None:
    one = member(reachable)
    data = data_of(reachable / "data", "c1", "c2", "c3")
    choose_cohort("hospital_a", one.consortium.plan, data)  # imports, if Python is root's alone
    for path in one.folder.path.rglob("*"):
        inside = path.relative_to(one.folder.path).parts[0]
        owner = {"relay": RELAY, "trainer": TRAINER, "studies": TRAINER}.get(inside, 0)
        os.chown(path, owner, owner)
    one.join(Party("hospital_b"))
    allow(one.folder)
    site = ["--site", str(one.folder.path)]
    approve = ["plan", "approve", "tiny", "--data", str(data), *site]
    assert CliRunner().invoke(cli.app, approve, catch_exceptions=False).exit_code == 0
    for path in one.folder.relay.rglob("*"):
        assert path.stat().st_uid == RELAY, path
    for folder in (one.folder.trainer, one.folder.studies):
        for path in folder.rglob("*"):
            assert path.stat().st_uid == TRAINER, path
    (data / "sites.csv").chmod(0o600)  # only root may read it, the trainer could not
    with pytest.raises(DataError):
        CliRunner().invoke(cli.app, approve, catch_exceptions=False)
    assert os.geteuid() == 0
    assert CliRunner().invoke(cli.app, ["leave", "tiny", "--yes", *site]).exit_code == 0
    assert one.folder.joined == one.folder.linked == ()
