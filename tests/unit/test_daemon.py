"""The coordinator's daemon between its programs: what a turn does when the disk is not kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_studies import founded

from coordinator.folder import StudyFolder
from coordinator.running.control import DaemonReport
from coordinator.running.daemon import Daemon
from fedseg.security.keys import load_signing_key


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return founded(tmp_path / "study")[0]


@pytest.fixture
def daemon(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A daemon whose SuperLink is a program that never listens, and without a proxy."""
    monkeypatch.setattr("coordinator.running.daemon.superlink_command", lambda *_: ("sleep", "60"))
    monkeypatch.setattr("coordinator.running.daemon._LOOK_S", 0.0)
    key = load_signing_key(folder.study_key)
    made = Daemon(folder, folder.settings(), key, with_proxy=False)
    yield made
    made._supervisor.stop_all()


def test_a_report_that_cannot_be_written_ends_nothing(
    daemon: Daemon, folder: StudyFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="coordinator")  # commands in this process may have said less
    blocked = folder.daemon_report.with_name(folder.daemon_report.name + ".part")
    blocked.mkdir()
    for _ in range(5):
        daemon.turn()
    assert caplog.text.count("out of date") == 1
    blocked.rmdir()
    daemon.turn()
    assert DaemonReport.model_validate_json(folder.daemon_report.read_bytes()).programs


def test_the_log_of_a_proxy_that_somebody_else_runs_is_kept_short(
    daemon: Daemon, folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reaches the port fills it, a line a refused request."""
    monkeypatch.setattr("fedseg.supervision.LONGEST_LOG_BYTES", 1000)
    log = folder.log("proxy")
    with log.open("ab") as nginx:
        nginx.write(b"refused " * 200)
        nginx.flush()
        daemon.turn()
        nginx.write(b"later")
    assert log.read_bytes() == b"later"


def test_a_log_is_cut_where_there_is_no_room_for_the_older_one(
    daemon: Daemon, folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedseg.supervision.LONGEST_LOG_BYTES", 1000)
    log = folder.log("proxy")
    log.write_bytes(b"refused " * 200)
    log.with_name("proxy.log.1").mkdir()
    daemon.turn()
    assert log.read_bytes() == b""
