"""The same study on Ray: the same bits, nothing that listens to or calls the outside."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_studies import environment, lasting, tiny_plan, tiny_private_plan, write_plan

from fedseg.result import StudyResult, load_result
from fedseg.simulation import simulate

LISTENS, LOOPBACK4, LOOPBACK6 = "0A", "0100007F", "00000000000000000000000001000000"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Watched:
    """A command, and what it and its descendants did to the network while they ran."""

    def __init__(self, *arguments: object) -> None:
        self.strangers: set[str] = set()
        self.workers: dict[int, dict[str, str]] = {}
        self.threads: dict[int, int] = {}
        self.family: set[int] = set()
        self._run([str(argument) for argument in arguments])

    def _run(self, arguments: list[str]) -> None:
        """Run the command and look at its family twice a second."""
        command = [sys.executable, "-c", "from fedseg.cli import main; main()", *arguments]
        child = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 400
        while child.poll() is None and time.monotonic() < deadline:
            self.family |= _family(child.pid)
            for pid in self.family:
                self._look_at(pid)
            time.sleep(0.5)
        if child.poll() is None:
            child.kill()
        self.output = child.communicate()[0]
        self.status = child.returncode

    def _look_at(self, pid: int) -> None:
        """Sockets, environment and threads of one process."""
        try:
            self.strangers |= {f"{_command(pid)}: {end}" for end in _ends_outside(pid)}
            if "ray::" in _command(pid) and "Actor" in _command(pid):
                entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
                pairs = (entry.partition("=") for entry in entries.split("\0"))
                self.workers[pid] = {name: value for name, _, value in pairs}
        except OSError:
            return  # it ended while we looked

    def left_over(self) -> list[str]:
        """Processes of the family that still live, half a minute later at most."""
        for _ in range(150):
            alive = [_command(pid) for pid in self.family if _alive(pid)]
            if not alive:
                return []
            time.sleep(0.2)
        return alive


def _family(root: int) -> set[int]:
    """A process and all its descendants, in Ray's case also those whose parent has gone."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found, more = {root}, {root}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - found
        found |= more
    return found


def _command(pid: int) -> str:
    """A process's command line."""
    try:
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return data.replace(b"\0", b" ").decode(errors="replace").strip()


def _alive(pid: int) -> bool:
    """True while a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _ends_outside(pid: int) -> set[str]:
    """Internet sockets of a process that listen beyond loopback or have such a peer."""
    mine = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            mine.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, remote, state, *rest = line.split()
            if rest[5] not in mine:
                continue
            bound, peer = local.split(":")[0], remote.split(":")[0]
            if state == LISTENS and not _is_loopback(bound):
                found.add(f"{table} listens on {bound}:{int(local.split(':')[1], 16)}")
            if int(peer, 16) and not _is_loopback(peer):
                found.add(f"{table} speaks to {peer}")
    return found


def _is_loopback(address: str) -> bool:
    """127.0.0.0/8, ::1, and the former written as IPv6."""
    v4 = address.removeprefix("0000000000000000FFFF0000")
    return address == LOOPBACK6 or (len(v4) == 8 and v4.endswith("7F"))


def test_ray_gives_the_same_bits_and_keeps_to_itself(
    data: Path, tmp_path: Path, undisturbed: tuple[Path, StudyResult]
) -> None:
    plan = write_plan(tmp_path / "study.yaml", tiny_plan())
    out = tmp_path / "out"
    ray = Watched("simulate", plan, "--data", data, "--out", out, "--engine", "ray")
    assert ray.status == 0, ray.output
    here, there = lasting(undisturbed[0]), lasting(out)
    asked_for = ("federated", "finetuned")  # not the baselines
    here["result"]["arms"] = [a for a in here["result"]["arms"] if a["name"] in asked_for]
    assert there["model"] == here["model"]
    assert there["result"] == here["result"]
    assert load_result(out / "result.json").run.engine == "ray"
    assert ray.strangers == set()
    assert "DEPRECATED" not in ray.output
    assert ray.workers
    for seen in ray.workers.values():
        assert {name: seen.get(name) for name in QUIET} == QUIET
    assert ray.left_over() == []


@pytest.mark.slow
def test_ray_with_momentum_fedprox_and_a_broken_site(data: Path, tmp_path: Path) -> None:
    plan = tiny_plan(
        aggregation={
            "strategy": "fedprox",
            "proximal_mu": 0.1,
            "server_momentum": 0.6,
            "weight_averaging": 0.8,
        }
    )
    path = write_plan(tmp_path / "study.yaml", plan)
    faults = ("--fault", "hospital_b:crash@2", "--fault", "hospital_c:nan@3")
    command = ("simulate", path, "--data", data, *faults)
    ray = Watched(*command, "--out", tmp_path / "ray", "--engine", "ray")
    assert ray.status == 0, ray.output
    here = Watched(*command, "--out", tmp_path / "here")
    assert here.status == 0, here.output
    assert here.strangers == ray.strangers == set()
    assert lasting(tmp_path / "ray") == lasting(tmp_path / "here")


@pytest.mark.slow
def test_ray_gives_the_bits_of_a_study_with_liars_and_a_robust_rule(
    data: Path, tmp_path: Path
) -> None:
    plan = tiny_plan(aggregation={"combine": {"rule": "median"}, "weighting": "uniform"})
    path = write_plan(tmp_path / "study.yaml", plan)
    liars = ("--fault", "hospital_b:alie", "--fault", "hospital_c:alie")
    command = ("simulate", path, "--data", data, *liars)
    ray = Watched(*command, "--out", tmp_path / "ray", "--engine", "ray")
    assert ray.status == 0, ray.output
    here = Watched(*command, "--out", tmp_path / "here")
    assert here.status == 0, here.output
    assert lasting(tmp_path / "ray") == lasting(tmp_path / "here")


@pytest.mark.slow
def test_ray_gives_the_bits_of_a_seeded_private_study(data: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "study.yaml", tiny_private_plan())
    command = ("simulate", path, "--data", data, "--noise-seed", "3")
    ray = Watched(*command, "--out", tmp_path / "ray", "--engine", "ray")
    assert ray.status == 0, ray.output
    here = Watched(*command, "--out", tmp_path / "here")
    assert here.status == 0, here.output
    assert lasting(tmp_path / "ray") == lasting(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_site_that_hangs_on_ray_is_not_waited_for(data: Path, tmp_path: Path) -> None:
    plan = tiny_plan(aggregation={"round_timeout_s": 60.0, "rounds": 2})
    path = write_plan(tmp_path / "study.yaml", plan)
    command = ("simulate", path, "--data", data, "--out", tmp_path / "out", "--engine", "ray")
    ray = Watched(*command, "--fault", "hospital_b:hang@2")
    assert ray.status == 0, ray.output
    stages = load_result(tmp_path / "out" / "result.json").stages
    failures = [(f.site, f.code) for r in stages if r.stage == "train" for f in r.failures]
    assert failures == [("hospital_b", "timeout")]
    assert ray.left_over() == []


@pytest.mark.slow
def test_a_study_begun_on_ray_goes_on_in_one_process(
    data: Path, tmp_path: Path, undisturbed: tuple[Path, StudyResult]
) -> None:
    """Too few sites on Ray, then mended: the engine is no part of the study."""
    out, path = tmp_path / "out", write_plan(tmp_path / "study.yaml", tiny_plan())
    faults = ("--fault", "hospital_a:crash@2", "--fault", "hospital_d:crash@2")
    ray = Watched("simulate", path, "--data", data, "--out", out, "--engine", "ray", *faults)
    assert ray.status == 1
    assert "3 sites must answer, 2 did" in ray.output
    assert ray.left_over() == []
    from fedseg.simulation import Options

    result = simulate(tiny_plan(), data, out, Options(resume=True))
    assert result.model_digest == undisturbed[1].model_digest


def test_one_process_speaks_to_nobody(data: Path, tmp_path: Path) -> None:
    plan = tiny_plan(aggregation={"rounds": 2}, evaluation={"every_rounds": 2})
    path = write_plan(tmp_path / "study.yaml", plan)
    command = ("simulate", path, "--data", data, "--out", tmp_path / "out", "--json")
    here = Watched(*command)
    assert here.status == 0, here.output
    result: dict[str, Any] = json.loads(here.output[here.output.index('{"format') :])
    assert result["run"]["engine"] == "inprocess"
    assert here.strangers == set()
