"""What the site daemon says of itself is less than what it does: a full disk does not end it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sites import daemon as module
from sites.daemon import Daemon
from sites.folder import SiteFolder
from sites.founding import found
from sites.listening import Place
from sites.notes import read_note
from sites.status import SiteStatus


def test_a_status_that_cannot_be_written_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for pause in ("LOOK_S", "STATUS_S"):
        monkeypatch.setattr(module, pause, 0.0)
    folder = SiteFolder(tmp_path / "site")
    found(folder, "hospital_a", "2026-05-03T12:00:00+00:00")
    daemon = Daemon(folder, Place(f"unix:{folder.socket}"))
    in_the_way = folder.status.with_name("status.json.part")
    in_the_way.mkdir()
    daemon._write_status()
    assert "cannot write status.json" in caplog.text
    in_the_way.rmdir()
    daemon._write_status()
    assert read_note(folder.status, SiteStatus).site == "hospital_a"


def test_the_status_says_why_the_trainer_ended_but_never_what_a_traceback_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    folder = SiteFolder(tmp_path / "site")
    found(folder, "hospital_a", "2026-05-03T12:00:00+00:00")
    daemon = Daemon(folder, Place(f"unix:{folder.socket}"))
    folder.trainer_log.write_text("earlier\ncannot listen on trainer.sock: no space\n")
    daemon._write_status()
    said = read_note(folder.status, SiteStatus).trainer.state
    assert said.endswith("cannot listen on trainer.sock: no space")
    folder.trainer_log.write_text("Traceback (most recent call last):\nValueError: jane_doe.nii\n")
    daemon._write_status()
    assert read_note(folder.status, SiteStatus).trainer.state.endswith("trainer.log says why")
