"""The benchmark of a private step runs, at a tiny size, with every method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
