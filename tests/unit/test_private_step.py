"""The benchmark of a private step runs, at a tiny size, with every method."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("private_step")


def test_a_row_that_ended_is_kept_and_not_measured_again(
    step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(row: str, methods: list[str], steps: int) -> list[dict[str, object]]:
        measured.append(row)
        if measured == ["2d-tiny", "3d-19M-b4"]:
            raise KeyboardInterrupt
        return [{"network": row, "method": method, "error": "none"} for method in methods]

    out = tmp_path / "rows.json"
    rows, methods = "2d-tiny,3d-19M-b4", "plain,ours"
    command = ["x", "--out", str(out), "--rows", rows, "--methods", methods, "--steps", "2"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(step, "_measure", measure)
    with pytest.raises(KeyboardInterrupt):
        step.main()
    assert [row["network"] for row in json.loads(out.read_text())["rows"]] == ["2d-tiny"] * 2
    step.main()
    step.main()
    assert measured == ["2d-tiny", "3d-19M-b4", "3d-19M-b4"]
    assert [row["network"] for row in json.loads(out.read_text())["rows"]] == [
        "2d-tiny", "2d-tiny", "3d-19M-b4", "3d-19M-b4",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*command[:-1], "3"])
    with pytest.raises(SystemExit, match="2 steps"):
        step.main()


def test_the_summary_is_medians_and_worst_rows(step: ModuleType) -> None:
    rows = [
        {"network": name, "method": method, "batch": 2, "parameters": 2**20,
         "cpu_s": cpu, "peak_mb": 100 + held, "start_mb": 100}
        for name, plain, ours, opacus in (("a", 1.0, 1.1, 2.2), ("b", 2.0, 2.4, 3.6))
        for method, cpu, held in (
            ("plain", plain, 10), ("ours", ours, 14), ("opacus-hooks", opacus, 30)
        )
    ]  # fmt: skip
    assert step._summary(rows) == [
        "ours / plain: median 1.15, worst 1.20",
        "memory beyond plain's / a gradient for each patient: worst 0.50",
        "best Opacus / ours: median 1.75, worst 1.50",
    ]


def test_a_profile_adds_up(step: ModuleType) -> None:
    profile = importlib.import_module("private_profile")
    table = profile.explain(*step._build("2d-tiny"), 0.1, 1).splitlines()
    parts = {line[:28].strip(): [float(n) for n in line[28:].split()[:2]] for line in table[1:]}
    assert parts["forward"][0] > 0 and parts["weights, transposed"][1] > 0
    for column in (0, 1):
        own = sum(pair[column] for name, pair in parts.items() if name != "sum")
        assert own == pytest.approx(parts["sum"][column], abs=0.1 * len(parts))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_every_row_has_time_memory_and_method() -> None:
    methods = ["plain", "ours", "ours-two-pass", "opacus-hooks"]
    script = str(ROOT / "benchmarks" / "private_step.py")
    command = [sys.executable, script, "--json", "--rows", "2d-tiny", "--steps", "1"]
    done = subprocess.run(
        [*command, "--methods", ",".join(methods)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)["rows"]
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert (row["network"], row["dims"], row["batch"], row["size"]) == ("2d-tiny", 2, 2, 16)
        assert row["cpu_s"] > 0 and row["peak_mb"] >= row["start_mb"] > 50
