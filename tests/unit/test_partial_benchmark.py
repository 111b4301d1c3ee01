"""The benchmark of partial labels runs, and prints differences that are paired over patients."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedseg.imaging.phantoms import write_phantoms

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "partial_labels.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module(SCRIPT.stem)


def result(arm: str, dice: dict[str, tuple[float, float]]) -> dict[str, Any]:
    patients = [
        {"site": "a", "patient": str(i), "dice": {name: values[i] for name, values in dice.items()}}
        for i in range(2)
    ]
    means = {name: sum(values) / 2 for name, values in dice.items()}
    return {"arm": arm, "seed": 1, "steps": 4, "cpu_s": 1.0, "dice": means, "patients": patients}


def test_differences_are_in_points_of_each_label(script: ModuleType) -> None:
    arms = [
        result("all", {"x": (0.8, 0.9), "y": (0.5, 0.7)}),
        result("partial", {"x": (0.79, 0.89), "y": (0.45, 0.65)}),
    ]
    summary = script.summarise(arms)
    labels = summary["partial"]["labels"]
    assert labels["x"]["points"] == pytest.approx(-1.0) and labels["x"]["reached"]
    assert labels["y"]["points"] == pytest.approx(-5.0) and not labels["y"]["reached"]
    assert "| partial | x | 0.8400 | -1.00 (-1.00 to -1.00) |" in script.table(summary)


@pytest.mark.slow
def test_the_arms_run_on_phantoms_and_are_not_trained_twice(tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "data", sites=3, patients_per_site=3, shape=(16, 16, 16))
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--out", str(tmp_path / "out")]
    command += ["--rounds", "1", "--steps", "1", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert [arm["arm"] for arm in found[0]["arms"]] == ["all", "partial", "background"]
    assert len(found[0]["arms"][1]["missing"]) == 3
