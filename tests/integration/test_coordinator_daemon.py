"""The coordinator's daemon with the real SuperLink, nginx and SuperNodes, killed where it hurts."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from answering_sites import Site, a_study, enrolled
from small_plans import tiny_model

from coordinator.folder import StudyFolder
from coordinator.running.control import DaemonReport, look
from coordinator.running.superlink import SuperLink
from fedseg.chain import verify_chain
from fedseg.modelfile import load_model
from fedseg.offspring import strays
from fedseg.security.keys import load_signing_key
from fedseg.sole import holder
from fedseg.supervision import Supervisor

COMMAND = str(Path(sys.executable).parent / "fedseg-coordinator")
PATIENCE_S = 240.0


def ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def start(folder: StudyFolder) -> subprocess.Popen[bytes]:
    with (folder.path.with_name("daemon.out")).open("ab") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [COMMAND, "run", str(folder.path)]
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out)


@contextmanager
def daemon(folder: StudyFolder) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The daemon; the last of the list is the one that lives."""
    lives = [start(folder)]
    try:
        yield lives
    finally:
        lives[-1].terminate()
        lives[-1].wait(30)


def report(folder: StudyFolder) -> DaemonReport:
    try:
        return DaemonReport.model_validate_json(folder.daemon_report.read_bytes())
    except FileNotFoundError:
        return DaemonReport(pid=0)


def pid_of(folder: StudyFolder, program: str) -> int | None:
    found = [p.pid for p in report(folder).programs if p.name == program and p.ready]
    return found[0] if found else None


def until(wanted: Callable[[], object], folder: StudyFolder, turn: Callable[[], None]) -> float:
    """Turn until something is true; the seconds it took."""
    started = time.monotonic()
    while not wanted():
        turn()
        time.sleep(0.05)
        logs = folder.path.with_name("daemon.out")
        assert time.monotonic() - started < PATIENCE_S, logs.read_text()[-6000:]
    return time.monotonic() - started


def call(folder: StudyFolder, path: str) -> int:
    """A call from outside; its status."""
    settings = folder.settings()
    trust = ssl.create_default_context(cafile=str(folder.ca_certificate))
    outside = http.client.HTTPSConnection("localhost", settings.port, timeout=10, context=trust)
    try:
        outside.request("POST", path, b"", {"content-type": "application/protobuf"})
        return outside.getresponse().status
    finally:
        outside.close()


def command(folder: StudyFolder, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments, "--study", str(folder.path)],
        capture_output=True,
        text=True,
        check=False,
    )


def events(folder: StudyFolder) -> list[str]:
    key = load_signing_key(folder.study_key).public
    return [entry.event for entry in verify_chain(folder.audit, key)]


def runs(pid: int | None) -> bool:
    """Whether a process runs; one that died and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def nothing_lives(folder: StudyFolder) -> bool:
    return holder(folder.daemon_pid) is None and strays(str(folder.path), []) == []


def test_an_operator_runs_watches_pauses_and_stops_a_study(tmp_path):
    folder = a_study(tmp_path / "study", *ports(2))
    with (
        enrolled(folder, "hospital_a", ports=ports(1)) as (site,),
        daemon(folder) as (life,),
    ):
        took = until(lambda: report(folder).nodes, folder, lambda: None)
        print(f"from start to the first node registered: {took:.1f} s")
        seen = look(folder, datetime.now(UTC))
        assert [node.site for node in seen.daemon.nodes] == ["hospital_a"]
        assert seen.daemon.trouble == "the plan needs 2 sites, 1 are enrolled: enrol more"

        second = command_run(folder)
        assert second.returncode == 1
        assert f"a coordinator runs on this study already, in process {life.pid}" in second.stderr

        for path in ("control/start-run", "control/register-node", "runtime/acquire-task"):
            assert call(folder, f"/v1/{path}") == 404
        assert call(folder, "/v1/fleet/pull-messages") not in {404, 502}

        told = json.loads(command(folder, "status", "--json").stdout)
        assert told["daemon"]["programs"][0]["ready"] and told["warnings"] == []
        assert "hospital_a  no" in command(folder, "status").stdout.replace("   ", "  ")

        assert "pauses" in command(folder, "pause").stdout
        until(lambda: report(folder).paused, folder, lambda: None)
        assert "goes on" in command(folder, "resume").stdout
        until(lambda: not report(folder).paused, folder, lambda: None)
        assert "the coordinator of tiny starts" in command(folder, "logs", "--of", "daemon").stdout

        assert site.name in [node.name for node in SuperLink(folder, folder.settings()).nodes()]
        assert "has stopped" in command(folder, "stop").stdout
        assert life.wait(10) == 0 and nothing_lives(folder)
        refused = command(folder, "stop")
        assert refused.returncode == 1 and "there is nothing to stop" in refused.stderr
    assert events(folder)[-4:] == ["started", "paused", "resumed", "stopped"]


def command_run(folder: StudyFolder) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "run", str(folder.path)], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "victims",
    [
        pytest.param(("superlink", "run"), id="superlink-run"),
        pytest.param(
            ("superlink", "run", "proxy", "daemon"), id="everything", marks=pytest.mark.slow
        ),
    ],
)
def test_a_study_ends_the_same_whoever_is_killed(tmp_path, victims):
    """Each is killed in mid-round; no update counts twice."""
    folder = a_study(
        tmp_path / "study", *ports(2), aggregation__rounds=len(victims), evaluation__every_rounds=9
    )
    names = ("hospital_a", "hospital_b")
    with (
        enrolled(folder, *names, ports=ports(2)) as sites,
        daemon(folder) as lives,
    ):
        relays = Supervisor([site.relay for site in sites], observe=lambda _: None)
        try:
            _kill_in_every_round(folder, sites, lives, victims, relays.step)
            took = until(lambda: report(folder).finished, folder, relays.step)
            print(f"from the last kill to the end: {took:.1f} s")
        finally:
            relays.stop_all()
    assert nothing_lives(folder)
    _, model = load_model(folder.model)
    rounds = range(1, len(victims) + 1)
    for name, value in tiny_model().items():
        wanted = value + sum(np.mean([s.update(r)[name] for s in sites], 0) for r in rounds)
        np.testing.assert_allclose(model[name], wanted, atol=1e-6)
    assert all(site.served[-1] == ("release", len(victims)) for site in sites)
    progress = look(folder, datetime.now(UTC)).progress
    assert progress.finished and progress.rounds_closed == len(victims)
    happened = events(folder)
    assert happened.count("started") == 1 + ("daemon" in victims)
    assert happened.count("stopped") == 1
    assert happened.count("released") == 1


def _kill_in_every_round(
    folder: StudyFolder,
    sites: list[Site],
    lives: list[subprocess.Popen[bytes]],
    victims: tuple[str, ...],
    turn: Callable[[], None],
) -> None:
    """Kill one thing in each round, once a site works on it; print how long it takes."""

    def in_round(round_: int) -> bool:
        return any(site.served[-1:] == [("train", round_)] for site in sites)

    def works_anew(pid: int | None) -> Callable[[], bool]:
        return lambda: report(folder).run_pid not in {None, pid} and lives[-1].poll() is None

    took = until(lambda: report(folder).run_pid, folder, turn)
    print(f"from start to the run working: {took:.1f} s")
    for round_, victim in enumerate(victims, 1):
        until(lambda round_=round_: in_round(round_), folder, turn)
        run, killed = report(folder).run_pid, pid_of(folder, victim)
        if victim == "daemon":
            programs = [program.pid for program in report(folder).programs]
            lives[-1].kill()
            lives[-1].wait()
            until(lambda pids=programs: not any(map(runs, pids)), folder, lambda: None)
            lives.append(start(folder))
        else:
            os.kill(run if victim == "run" else killed, signal.SIGKILL)  # type: ignore[arg-type]
        back = (
            (lambda killed=killed: pid_of(folder, "proxy") not in {None, killed})
            if victim == "proxy"
            else works_anew(run)
        )
        print(f"{victim} killed in round {round_}: back after {until(back, folder, turn):.1f} s")
