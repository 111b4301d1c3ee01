"""The site's daemon as an administrator meets it: real processes, killed, paused and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_hospitals import Hospital, approved, hospital, phantoms

from fedseg.security.keys import load_signing_key, save_key
from fedseg.shell import PASSPHRASE_FILE
from sites.client import Door, ask
from sites.standing import standing

NOBODY = "127.0.0.1:9"
COMMAND = "from sites.cli import main; main()"
pytestmark = pytest.mark.timeout(400)


class Daemon:
    """`fedseg-site run`, and what the other commands say of it."""

    def __init__(self, site: Hospital) -> None:
        self.site, self.folder = site, site.folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.folder.daemon_log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "run", str(self.folder.path)],
                env=environment(),
                stderr=log,
            )
        self.until(lambda found: found["trainer"]["state"] == "ready")

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", COMMAND, *words, "--site", str(self.folder.path)],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def status(self) -> dict[str, Any]:
        return standing(self.folder)

    def until(self, met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while not met(found := self.status()):
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        return found

    def children(self) -> list[int]:
        """Every process that bears this folder's name or Flower's home in it, but the daemon."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                said = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            daemon = self.process is not None and entry.name == str(self.process.pid)
            if str(self.folder.path).encode() in said and not daemon:
                found.append(int(entry.name))
        return found

    def pid_of(self, word: str) -> int:
        for pid in self.children():
            if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError(f"no process {word}")


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "PYTEST_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "160"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms(tmp_path_factory.mktemp("phantoms"))


@pytest.fixture
def daemon(data: Path, tmp_path: Path) -> Iterator[Daemon]:
    site = hospital(tmp_path / "s", data, address=NOBODY)
    found = Daemon(site)
    yield found
    if found.process is not None and found.process.poll() is None:
        found.process.send_signal(signal.SIGTERM)
        found.process.wait(30)
    assert found.children() == []


def test_a_site_runs_survives_a_kill_pauses_and_stops(daemon: Daemon) -> None:
    site = daemon.site
    daemon.start()
    second = daemon.command("trainer")
    assert (second.returncode, "already" in second.stderr) == (1, True)
    answers: list[bytes] = []
    door, envelope = Door(f"unix:{daemon.folder.socket}"), site.task()
    asking = threading.Thread(target=lambda: answers.append(ask(door, "tiny", envelope)))
    asking.start()
    daemon.until(lambda found: found["trainer"]["doing"] is not None or bool(answers))
    os.kill(daemon.pid_of("trainer"), signal.SIGKILL)
    asking.join(60)
    assert site.said(answers[0]).body.kind == "train"
    found = daemon.until(lambda found: found["trainer"]["restarts"] == 1)
    assert found["studies"]["tiny"]["last"] == {"round": 1, "stage": "train"}
    assert len(site.audited("started")) == 2

    shown = daemon.command("status", "--json")
    assert shown.returncode == 0
    assert json.loads(shown.stdout)["trainer"]["answers"]
    assert daemon.command("pause").returncode == 0
    daemon.until(lambda found: found["studies"]["tiny"]["relay"] == "paused")
    assert not [pid for pid in daemon.children() if pid != daemon.pid_of("trainer")]
    assert daemon.command("resume").returncode == 0
    daemon.until(lambda found: "reached" in found["studies"]["tiny"]["relay"])
    deadline = time.monotonic() + 10
    while not site.audited("resumed"):
        assert time.monotonic() < deadline
        time.sleep(0.2)

    assert daemon.command("stop").returncode == 0
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0
    assert daemon.children() == []
    assert not daemon.folder.socket.exists()
    assert len(site.audited("stopped")) == 1
    assert daemon.command("status").returncode == 1


def test_a_killed_daemon_leaves_nothing_and_the_next_one_goes_on(
    daemon: Daemon, data: Path
) -> None:
    daemon.folder.approval("tiny").unlink()
    daemon.start()
    found = daemon.status()
    assert "plan approve tiny" in found["studies"]["tiny"]["relay"]
    approved(daemon.folder, daemon.site.consortium, data)
    daemon.until(lambda found: "reached" in found["studies"]["tiny"]["relay"])
    refused = daemon.command("run", str(daemon.folder.path))
    assert refused.returncode != 0
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait()
    daemon.process = None
    daemon.start()  # what the relay's SuperExec is ended with, at the latest
    deadline = time.monotonic() + 20
    while len(daemon.children()) > 3:  # trainer, SuperNode, SuperExec
        assert time.monotonic() < deadline
        time.sleep(0.2)
    daemon.folder.link("tiny").unlink()
    daemon.until(lambda found: not found["studies"])
    while daemon.children() != [daemon.pid_of("trainer")]:
        assert time.monotonic() < deadline + 20
        time.sleep(0.2)


def test_keys_with_a_passphrase_need_a_file_that_holds_it(daemon: Daemon) -> None:
    path = daemon.folder.signing_key
    key = load_signing_key(path)
    path.unlink()
    save_key(path, key, b"correct horse")
    refused = daemon.command("trainer")
    assert refused.returncode == 1
    started = subprocess.run(
        [sys.executable, "-c", COMMAND, "run", str(daemon.folder.path)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert started.returncode == 1
    assert PASSPHRASE_FILE in started.stderr
    assert daemon.children() == []
