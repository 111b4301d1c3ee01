"""The benchmark of what a guarantee costs in Dice runs, and its shares are the ones it says."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedseg.imaging.phantoms import write_phantoms
from fedseg.modelfile import save_model
from fedseg.models.zoo import initial_model
from fedseg.plan import parse_plan
from fedseg.planfile import example

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "private_hippocampus.py"


def test_an_arm_is_trained_in_the_simulation_under_its_guarantee(tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "data", sites=3, patients_per_site=3, shape=(16, 16, 16))
    plan = parse_plan(example("mr-3d").replace("[32, 64, 128]", "[16, 32, 64, 128]").encode())
    start = tmp_path / "start.safetensors"
    save_model(start, plan, initial_model(plan)[1], arm="initial", rounds=0)
    arguments = ["--data", data, "--out", tmp_path / "out", "--start", start, "--seeds", "1"]
    arguments += ["--only", "zero,private-8-1e-3", "--rounds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    private = found["summary"]["private-8-1e-3"]
    assert 0.3 < private["noise_multiplier"] < 1 and private["trained_parameters"] == 576
    assert len(private["gain"]) == 3
    plans = {arm["arm"]: arm["plan"] for arm in found["arms"]}
    assert plans["zero"]["privacy"]["guarantee"] == "none"
    assert plans["private-8-1e-3"]["privacy"]["delta"] == 1e-3


def test_the_share_recovered_is_of_the_gain_over_the_initial_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    benchmark = importlib.import_module(SCRIPT.stem)

    def run(arm: str, seed: int, *dice: float) -> dict[str, Any]:
        patients = {f"P{i}": value for i, value in enumerate(dice)}
        mean = sum(dice) / len(dice)
        rest = {"noise_multiplier": None, "trained_parameters": 1, "training_patients": 9}
        return {
            "arm": arm,
            "seed": seed,
            "mean_dice": mean,
            "patients": patients,
            "cpu_s": 1.0,
        } | rest

    summary = benchmark.summarise(
        [
            run("zero", 1, 0.2, 0.4),
            run("same-part", 1, 0.6, 0.8),
            run("private-8-1e-3", 1, 0.4, 0.5),
            run("private-8-1e-3", 2, 0.4, 0.7),
        ]
    )
    row = summary["private-8-1e-3"]
    assert row["mean_dice"] == pytest.approx(0.5) and row["seeds"] == 2
    assert row["gain"] == pytest.approx([0.2, 0.2, 0.2])  # both patients gain 0.2 over the seeds
    assert row["of_same-part"] == pytest.approx([0.5, 0.5, 0.5])
    assert "0.50 (0.50 to 0.50)" in benchmark.table(summary)
