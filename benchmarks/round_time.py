"""Seconds of a trivial round over three sites, where they go, and what Flower alone needs.

    python benchmarks/round_time.py [--out DIR] [--rounds 10] [--large]

A real federation on this machine (coordinator, proxy, three sites; TLS, node authentication, sealed
tasks) runs a study whose training is two steps on patches of 16 voxels a side. Afterwards the same
SuperLink and SuperNodes run a bare Flower app that echoes a few bytes: the floor. Both are warm:
the first stage of each is left out. At the end one site's relay is started five times alone. The
clocks of all processes are one, so the audit logs of both sides, to the second, tell where a
stage's time goes. `--large` runs one round of a model of 120 MB
instead; both give each kind of process's peak memory (VmHWM, MB of 10**6 bytes).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "integration"))

from tiny_studies import PLAN

from fedseg.chain import read_chain
from fedseg.commands.federation import write_plan_file
from fedseg.imaging.phantoms import write_phantoms
from fedseg.offspring import descendants, is_alive
from fedseg.quiet import QUIET
from fedseg.simulation.deployment import Deployment
from fedseg.simulation.hospitals import divide
from sites.relay import relay_of, what_it_says

SITES = 3
LARGE = {"options": {"channels": [64, 128, 256, 512, 1024], "residual_units": 0}}
KINDS = {
    "flower-superlink": "superlink",
    "flwr-serverapp": "ServerApp",
    "flwr-clientapp": "relay's ClientApp",
    "sites.supernode": "relay",
    "flower-superexec": "superexec",
    "fedseg-site\0trainer": "trainer",
    "fedseg-coordinator": "coordinator's daemon",
    "fedseg-site": "site's daemon",
    "nginx": "proxy",
}
BARE = {
    "pyproject.toml": """
[project]
name = "bare"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "fedseg"
[tool.flwr.app.components]
serverapp = "bare.server:app"
clientapp = "bare.client:app"
[tool.flwr.app.config]
note = ""
rounds = 0
""",
    "bare/__init__.py": "",
    "bare/client.py": """
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def echo(message, context):
    return Message(message.content, reply_to=message)
""",
    "bare/server.py": """
import json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    seconds = []
    for round_ in range(context.run_config["rounds"] + 1):
        started = time.monotonic()
        content = RecordDict({"round": ConfigRecord({"round": round_})})
        nodes = list(grid.get_node_ids())
        sent = [Message(content, dst_node_id=n, message_type="query") for n in nodes]
        waiting = set(grid.push_messages(sent))
        while waiting:
            for one in list(waiting):
                if list(grid.pull_messages([one])):
                    waiting.discard(one)
            time.sleep(0.1)
        seconds.append(time.monotonic() - started)
        with open(context.run_config["note"], "w") as stream:
            json.dump({"nodes": len(nodes), "seconds": seconds}, stream)
""",
}


def main() -> None:
    """See the module."""
    arguments = _parse()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="round-time-"))
    rounds = 1 if arguments.large else arguments.rounds + 1
    deployment = _deployment(out.resolve(), rounds, large=arguments.large)
    deployment.set_up()
    peaks = Peaks(deployment)
    try:
        deployment.start_all()
        peaks.start()
        last = deployment.wait(lambda p: p.finished, 3600, lambda _: None)
        closed = [(s.round, s.stage, s.timing.wall_s) for s in last.stages]
        bare = [] if arguments.large else _bare(deployment, arguments.rounds)
        relay = [] if arguments.large else _relay_starts(deployment)
    finally:
        deployment.stop_all()
    cold = 0 if arguments.large else 1
    train = [s for round_, stage, s in closed if stage == "train" and s and round_ > cold]
    evaluate = [s for round_, stage, s in closed if stage == "evaluate" and s and round_ > cold]
    found: dict[str, Any] = {
        "train_s": _spread(train),
        "four_stages_s": _spread([2 * (a + b) for a, b in zip(train, evaluate, strict=True)]),
        "where_a_train_stage_goes_s": _breakdown(deployment),
        "peaks_mb": peaks.found,
    }
    if bare:
        found["bare_flower_s"] = _spread(bare[1:])
        found["train_over_bare"] = round(median(train) / median(bare[1:]), 3)
        found["relay_start_s"] = _spread(relay)
    print(json.dumps(found, indent=1))


def _deployment(out: Path, rounds: int, *, large: bool) -> Deployment:
    """Three hospitals of small phantoms."""
    value = {
        **PLAN,
        "study": "large" if large else "trivial",
        "model": LARGE if large else PLAN["model"],
        "aggregation": {"rounds": rounds, "minimum_sites": SITES, "round_timeout_s": 900},
        "evaluation": {"metrics": ["dice"], "every_rounds": 1, "overlap": 0.0},
    }
    if large:
        value["task"] = {**PLAN["task"], "patch_size": [32, 32, 32]}
        value["training"] = {**PLAN["training"], "schedule": {"warmup_rounds": 0}}
    if not (out / "study.yaml").exists():
        out.mkdir(parents=True, exist_ok=True)
        write_plan_file(out / "study.yaml", value)
        write_phantoms(out / "data", sites=SITES, patients_per_site=3, shape=(24, 24, 24))
    return Deployment(out, out / "study.yaml", divide(out / "data", out / "data-of"))


def _bare(deployment: Deployment, rounds: int) -> list[float]:
    """Seconds of each round of the bare app on the same SuperLink and SuperNodes."""
    app, note = deployment.folder / "bare", deployment.folder / "bare.json"
    for name, text in BARE.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text)
    environment = {
        **os.environ,
        "FLWR_HOME": str(deployment.coordinator.flower),
        **QUIET,
    }
    command = [Path(sys.executable).with_name("flwr"), "run", app, "-c"]
    settings = f'note="{note}" rounds={rounds}'
    subprocess.run([*command, settings], env=environment, check=True, capture_output=True)
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            seconds = json.loads(note.read_text())["seconds"]
            if len(seconds) > rounds:
                return list(seconds)
        time.sleep(1)
    raise TimeoutError("the bare app did not finish")


def _relay_starts(deployment: Deployment, times: int = 5) -> list[float]:
    """Seconds from the start of one site's relay until it is on line; its daemon stands still."""
    name = next(iter(deployment.data))
    deployment.stop(name)
    relay = relay_of(deployment.site(name), deployment.plan.study)
    seconds = []
    for number in range(times):
        log = deployment.folder / f"relay-start-{number}.log"
        with log.open("wb") as stream:
            started = time.monotonic()
            process = subprocess.Popen(
                relay.command, env=dict(relay.environment), stdout=stream, stderr=stream
            )
        try:
            while what_it_says(log.read_text()) != "on line":
                if process.poll() is not None or time.monotonic() - started > 120:
                    raise TimeoutError(f"the relay is not on line: {log.read_text()[-500:]}")
                time.sleep(0.01)
            seconds.append(time.monotonic() - started)
        finally:
            rest = descendants(process.pid)
            for pid in (process.pid, *rest):
                os.kill(pid, signal.SIGTERM)
            process.wait(30)
        while any(is_alive(pid) for pid in rest):
            time.sleep(0.1)
    return seconds


def _breakdown(deployment: Deployment) -> dict[str, float]:
    """Median seconds from the task's sending to the last answer, by what was going on."""
    sent: dict[int, datetime] = {}
    received: dict[int, list[datetime]] = {}
    for entry in read_chain(deployment.coordinator.audit):
        if entry.facts.get("stage") == "train":
            round_ = int(entry.facts["round"])  # type: ignore[arg-type]
            if entry.event == "task_sent":
                sent[round_] = datetime.fromisoformat(entry.at)
            if entry.event == "answer_received":
                received.setdefault(round_, []).append(datetime.fromisoformat(entry.at))
    parts: dict[str, list[float]] = {"to the trainer": [], "trainer": [], "to the coordinator": []}
    for name in deployment.data:
        began: dict[int, datetime] = {}
        for entry in read_chain(deployment.site(name).audit):
            if entry.facts.get("stage") != "train":
                continue
            round_, at = int(entry.facts["round"]), datetime.fromisoformat(entry.at)  # type: ignore[arg-type]
            if entry.event == "task_received":
                began[round_] = at
                parts["to the trainer"].append((at - sent[round_]).total_seconds())
            if entry.event == "answered" and round_ in began:
                parts["trainer"].append((at - began[round_]).total_seconds())
                last = max(received[round_])
                parts["to the coordinator"].append((last - at).total_seconds())
    return {name: round(median(seconds), 2) for name, seconds in parts.items() if seconds}


class Peaks(threading.Thread):
    """Watches the largest resident size of every process of the federation, by kind."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(daemon=True)
        self._deployment = deployment
        self.found: dict[str, float] = {}

    def run(self) -> None:
        """Look twice a second until the program ends."""
        while True:
            with suppress(KeyError, OSError):
                for name in ("coordinator", *self._deployment.data):
                    daemon = self._deployment.pid(name)
                    for pid in (daemon, *descendants(daemon)):
                        self._look(pid)
            time.sleep(0.5)

    def _look(self, pid: int) -> None:
        with suppress(OSError, ValueError, StopIteration):
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
            kind = next(kind for words, kind in KINDS.items() if words in command)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    mb = int(line.split()[1]) * 1024 / 1e6
                    self.found[kind] = round(max(self.found.get(kind, 0), mb), 1)


def _spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(median(seconds), 2),
        "least": round(min(seconds), 2),
        "most": round(max(seconds), 2),
        "of": len(seconds),
    }


def _parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder; else a temporary one")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--large", action="store_true", help="a model of 120 MB, peak memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
