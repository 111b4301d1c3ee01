"""The benchmarks run, at tiny sizes, and print what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="the benchmarks read Linux's /proc"
)


def _run(script: str, *arguments: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--json", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_cost_of_federation_compares_equal_work_and_resumes(tmp_path):
    tiny = ["--rounds", "2", "--steps", "1", "--patients", "3", "--patch", "16,16,16"]
    command = ["federation_cost.py", *tiny, "--channels", "4,8", "--out", str(tmp_path)]
    first = _run(*command, "--seeds", "1", "--only", "plain")
    assert first["arms"]["plain"]["steps"] == 10
    result = _run(*command, "--seeds", "1", "--only", "inprocess,plain")
    assert result["arms"]["plain"] == {**result["arms"]["plain"], **first["arms"]["plain"]}
    assert result["arms"]["inprocess"]["same_work"] is True
    assert 0 < result["arms"]["inprocess"]["study_s"] < result["arms"]["inprocess"]["total_s"]
    assert result["arms"]["inprocess"]["peak_mb"] > 50


def test_coordinator_memory_is_measured_for_each_number_of_sites(tmp_path):
    tiny = ["--parameters", "600000", "--rounds", "1", "--out", str(tmp_path)]
    result = _run("coordinator_memory.py", *tiny, "--sites", "2,3")
    assert [run["answers"] for run in result["runs"]] == [2, 3]
    assert all(run["start_mb"] < run["peak_mb"] for run in result["runs"])
    assert result["settings"]["model_mb"] == pytest.approx(2.4, abs=0.1)


@pytest.mark.slow
def test_poisoning_compares_with_the_clean_mean_and_resumes(tmp_path):
    tiny = ["--rounds", "4", "--steps", "1", "--patients", "3", "--out", str(tmp_path)]
    _run("poisoning.py", *tiny, "--only", "clean-mean")
    result = _run("poisoning.py", *tiny, "--only", "clean-mean,sign_flip-multi_krum")
    clean, flipped = result["summary"]["clean-mean"], result["summary"]["sign_flip-multi_krum"]
    assert clean["loss_points"] == 0
    lost = (clean["mean_dice"] - flipped["mean_dice"]) / 0.01
    assert flipped["loss_points"] == pytest.approx(lost)
    assert flipped["named"] == [2]
    assert result["arms"][1]["liars"] == ["hospital_b", "hospital_g"]
    assert len(result["arms"][1]["hospitals"]) == 10
