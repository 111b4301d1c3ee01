"""Three hospitals and a coordinator over TLS, hurt in mid-round: the model is the simulation's.

`faulting.py` is the program; `make faults` runs it for longer and with every kind of fault.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_studies import environment

PROGRAM = Path(__file__).with_name("faulting.py")


@pytest.mark.timeout(900)
def test_a_study_that_is_hurt_five_times_ends_with_the_model_of_the_simulation(
    tmp_path: Path,
) -> None:
    if shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        pytest.skip("nginx is not installed: make system")
    kinds = ("trainer", "serverapp", "proxy", "network", "superlink")
    command = [sys.executable, str(PROGRAM), str(tmp_path / "run"), "5", "7", *kinds]
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(
            command, stdout=log, stderr=log, env=environment(), timeout=880, check=False
        )
    assert done.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [fault["kind"] for fault in summary["faults"]] == list(kinds)
    assert summary["same_model"]
    assert summary["most_trainings_of_a_round"] <= 2
