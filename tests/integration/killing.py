"""Runs `fedseg simulate` in child processes and kills them, again and again, until it finishes.

A program of its own: it imports everything once and forks a child for every run, so that a kill
costs no start of Python. Half of the kills come when a seeded number of files under OUT was opened
for writing, renamed, made or deleted (so that checkpoints, states, baselines and reports are hit
while they are being written), the other half after a seeded time.

    python killing.py PLAN DATA OUT KILLS SEED [OPTION...]

makes OUT/whole, a study that nothing happened to, and OUT/0, OUT/1, ...: studies that were killed,
KILLS times all together, and went on with --resume until they were finished. Prints, as JSON, how
each kill was timed and what the last file was that had been touched.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

import torch._dynamo  # torch.optim brings it in on first use

import fedseg.cli
import fedseg.evaluation.evaluate
import fedseg.reports.curves
import fedseg.reports.study
import fedseg.simulation.display
import fedseg.simulation.study
import sites.trainer

READY = (torch._dynamo, fedseg.evaluation, fedseg.reports, fedseg.simulation, sites.trainer)
CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.chmod", "os.truncate"}


def run(arguments: list[str], out: Path, event: int | None, delay_s: float | None) -> int | None:
    """Run once; the exit status, or None where the run was killed."""
    out.with_suffix(".log").touch()  # a child may die before it gets that far
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_fedseg([*arguments, "--out", str(out)], out, event)
    if delay_s is not None:
        time.sleep(max(0.0, delay_s - (time.monotonic() - started)))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"died of signal {os.WTERMSIG(status)}"
        return None
    return os.WEXITSTATUS(status)


def _become_fedseg(arguments: list[str], out: Path, event: int | None) -> None:
    """The child: `fedseg simulate` with its output in a file; never returns."""
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        sys.argv = ["fedseg", "simulate", *arguments]
        if event is not None:
            _die_at(event, str(out))
        fedseg.cli.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _die_at(event: int, out: str) -> None:
    """Kill this process just before its n-th change of a file under `out`."""
    seen = 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name not in CHANGES or not str(arguments[0]).startswith(out):
            return
        if name == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == event:
            os.write(2, f"@{name} {Path(arguments[0]).name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> None:
    """See the module."""
    plan, data, out, kills, seed, *options = sys.argv[1:]
    folder, rng = Path(out), Random(int(seed))
    folder.mkdir()
    arguments = [plan, "--data", data, *options]
    started = time.monotonic()
    assert run(arguments, folder / "whole", None, None) == 0, (folder / "whole.log").read_text()
    duration_s = time.monotonic() - started
    assert threading.active_count() == 1
    killed: list[str] = []
    study = 0
    while True:
        event = delay_s = None
        if len(killed) < int(kills):
            if len(killed) % 2:
                delay_s = rng.uniform(0, duration_s)
            else:
                event = rng.randint(1, 200)  # of about 470
        place = folder / str(study)
        status = run([*arguments, "--resume"], place, event, delay_s)
        if status is None:
            last = place.with_suffix(".log").read_text().splitlines()[-1:]
            killed.append(f"{delay_s:.2f} s" if delay_s is not None else "".join(last))
            continue
        assert status == 0, place.with_suffix(".log").read_text()
        study += 1
        if len(killed) == int(kills):
            break
    print(json.dumps({"studies": study, "kills": killed}))


if __name__ == "__main__":
    main()
