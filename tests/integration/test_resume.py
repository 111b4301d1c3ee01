"""A study killed at any moment goes on with --resume and ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_studies import environment, lasting, tiny_plan, tiny_private_plan, write_plan

from fedseg.errors import DataError, TrustError
from fedseg.plan import StudyPlan
from fedseg.result import StudyResult
from fedseg.simulation import Options, simulate

MOMENTUM = {"aggregation": {"strategy": "fedavgm", "server_momentum": 0.6, "weight_averaging": 0.8}}
ROBUST = {"aggregation": {"combine": {"rule": "median"}, "weighting": "uniform"}}
RESET = {"training": {"optimiser": {"learning_rate": 0.02, "state": "reset"}}}
PROXIMAL = {"aggregation": {"strategy": "fedprox", "proximal_mu": 0.1, "weighting": "uniform"}}


def _kill_until_finished(
    folder: Path, data: Path, plan: StudyPlan, kills: int, *options: str
) -> list[str]:
    """Kill studies as `killing.py` says, check every one, and tell where they were hit."""
    path = write_plan(folder / "study.yaml", plan)
    script = Path(__file__).with_name("killing.py")
    out = folder / "out"
    done = subprocess.run(
        [sys.executable, script, path, data, out, str(kills), "1", *options],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(told["kills"]) == kills
    whole = lasting(out / "whole")
    for study in range(told["studies"]):
        assert lasting(out / str(study)) == whole
        assert not list((out / str(study)).rglob("*.part"))
    return list(told["kills"])


def test_killed_studies_end_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    plan = tiny_plan(**MOMENTUM)
    kills = _kill_until_finished(tmp_path, data, plan, 4, "--baselines", "pooled,local")
    assert sum(kill.startswith("@") for kill in kills) == 2


def test_killed_studies_with_a_robust_rule_end_with_the_same_bits(
    data: Path, tmp_path: Path
) -> None:
    liars = ("--fault", "hospital_b:alie", "--fault", "hospital_c:alie")
    _kill_until_finished(tmp_path, data, tiny_plan(**ROBUST), 2, *liars)
    assert not list((tmp_path / "out").rglob("scratch"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("changes", "kills"),
    [({}, 40), (MOMENTUM, 20), (RESET, 10), (PROXIMAL, 10), (ROBUST, 20)],
    ids=["keep", "momentum", "reset", "fedprox", "median"],
)
def test_many_kills_change_no_bit(
    changes: dict[str, Any], kills: int, data: Path, tmp_path: Path
) -> None:
    _kill_until_finished(tmp_path, data, tiny_plan(**changes), kills, "--baselines", "pooled,local")


def test_killed_seeded_private_studies_end_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    kills = _kill_until_finished(tmp_path, data, tiny_private_plan(), 2, "--noise-seed", "3")
    assert sum(kill.startswith("@") for kill in kills) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_kills_change_no_bit_of_a_seeded_private_study(data: Path, tmp_path: Path) -> None:
    _kill_until_finished(tmp_path, data, tiny_private_plan(), 20, "--noise-seed", "3")


@pytest.mark.slow
def test_kills_change_no_bit_of_a_study_with_a_broken_site(data: Path, tmp_path: Path) -> None:
    fault = ("--fault", "hospital_b:nan@2", "--fault", "hospital_c:crash@3")
    _kill_until_finished(tmp_path, data, tiny_plan(), 10, *fault)


def test_a_command_killed_while_training_goes_on(
    data: Path, plan: StudyPlan, undisturbed: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    """The whole way, as a user has it: the command, kill -9, the command with --resume."""
    path, out = write_plan(tmp_path / "study.yaml", plan), tmp_path / "out"
    command = [sys.executable, "-c", "from fedseg.cli import main; main()", "simulate", path]
    command += ["--data", data, "--out", out, "--baselines", "pooled,local"]
    child = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (out / "federated" / "checkpoint.safetensors").exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (out / "result.json").exists()
    subprocess.run([*command, "--resume"], env=environment(), capture_output=True, check=True)
    assert lasting(out) == lasting(undisturbed[0])


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_study_is_not_overwritten_by_accident(
    data: Path, plan: StudyPlan, undisturbed: tuple[Path, StudyResult]
) -> None:
    out = undisturbed[0]
    before = _contents(out)
    with pytest.raises(DataError, match=r"holds this study already: go on with --resume, or"):
        simulate(plan, data, out)
    other = tiny_plan(training={"seed": 8})
    for resume in (False, True):
        with pytest.raises(DataError, match="a study of another plan: give another --out"):
            simulate(other, data, out, Options(resume=resume))
    assert _contents(out) == before


def test_resuming_a_finished_study_writes_the_same_again(
    data: Path, plan: StudyPlan, undisturbed: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    copy = shutil.copytree(undisturbed[0], tmp_path / "out")
    simulate(plan, data, copy, Options(resume=True, baselines=("pooled", "local")))
    assert lasting(copy) == lasting(undisturbed[0])


def test_resume_begins_a_study_that_was_never_begun(
    data: Path, plan: StudyPlan, undisturbed: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    result = simulate(plan, data, tmp_path / "out", Options(resume=True))
    assert result.model_digest == undisturbed[1].model_digest


def test_a_damaged_checkpoint_is_refused_and_not_begun_anew(
    data: Path, plan: StudyPlan, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    simulate(plan, data, out)
    checkpoint = out / "federated" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(TrustError):
        simulate(plan, data, out, Options(resume=True))
