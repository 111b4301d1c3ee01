"""The study's folder: what is taken for one, and which settings hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.folder import Settings, StudyFolder, new_settings, open_study
from fedseg.errors import DataError


def _settings(**changes: str | int) -> Settings:
    values: dict[str, str | int] = {"study": "tiny", "host": "fl.example.org", "created": "now"}
    return new_settings(**(values | changes))


def test_every_path_lies_in_the_folder_and_no_two_are_the_same(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    names = [name for name, value in vars(StudyFolder).items() if isinstance(value, property)]
    paths = [getattr(folder, name) for name in names]
    assert len(paths) > 25
    assert all(path.is_relative_to(folder.path) for path in paths)
    assert len(set(paths)) == len(paths)
    assert folder.bundle("a") == folder.path / "bundles" / "a.json"
    assert folder.log("proxy") == folder.path / "logs" / "proxy.log"


def test_a_relative_folder_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = StudyFolder("study")
    monkeypatch.chdir("/")
    assert folder.plan_file == tmp_path / "study" / "plan.json"


def test_a_folder_without_settings_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no study folder.*--study.*init"):
        open_study(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="no study folder"):
        open_study(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b"{" * 100_000, b'{"study": 1}'])
def test_damaged_settings_are_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.json").write_bytes(content)
    with pytest.raises(DataError, match=r"study\.json"):
        open_study(tmp_path)


def test_settings_come_back(tmp_path: Path) -> None:
    settings = _settings(port=8443, listen="127.0.0.1")
    (tmp_path / "study.json").write_text(settings.model_dump_json())
    assert open_study(tmp_path).settings() == settings


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("fl.example.org", "fl.example.org:443"),
        ("192.0.2.7", "192.0.2.7:443"),
        ("2001:DB8::7", "[2001:db8::7]:443"),
        ("localhost", "localhost:443"),
    ],
)
def test_sites_dial_the_host(host: str, address: str) -> None:
    assert _settings(host=host).address == address


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "fl.example.org; include /etc/passwd"},
        {"host": "fl.example.org\n"},
        {"host": "-x"},
        {"host": "a..b"},
        {"host": ""},
        {"host": "fe80::1%eth0; x"},
        {"host": "a/b"},
        {"listen": "example.org"},
        {"listen": "0.0.0.0; x"},
        {"port": 0},
        {"port": 65536},
        {"study": "../x"},
    ],
)
def test_what_cannot_be_a_setting_is_refused(wrong: dict[str, str | int]) -> None:
    """Host and address end up in nginx's configuration."""
    with pytest.raises(DataError, match=next(iter(wrong))):
        _settings(**wrong)
