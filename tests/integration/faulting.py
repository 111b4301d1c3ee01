"""One real federation, one fault after the other, until the study is finished all the same.

A program of its own, which `make faults` and the tests run. It starts a coordinator and three
hospitals as processes (see fedseg.simulation.deployment), waits for the wished moment of a round,
does harm, mends it where a person would have to, and measures how long it takes until the stage
that was open is closed. At the end it asks for more than survival: every hospital has to answer
every round, so the final model must be the simulation's, bit for bit. An update that was lost or
counted twice would show.

    python faulting.py OUT FAULTS SEED [KIND...]

is resumable: OUT/faults.jsonl holds what was done. Prints a table, and JSON in OUT/summary.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from tiny_studies import PLAN

from coordinator.progress.document import Progress
from fedseg.chain import verify_chain
from fedseg.commands.federation import write_plan_file
from fedseg.durable import write_atomically
from fedseg.imaging.phantoms import write_phantoms
from fedseg.modelfile import load_model
from fedseg.offspring import descendants
from fedseg.plan import StudyPlan
from fedseg.planfile import load_initial
from fedseg.security.keys import VerifyKey
from fedseg.simulation.deployment import Deployment, free_ports
from fedseg.simulation.hospitals import divide
from fedseg.simulation.options import Options
from fedseg.simulation.study import simulate
from fedseg.sole import holder

SITES = ("hospital_a", "hospital_b", "hospital_c")
KINDS = (
    *("relay", "trainer", "superlink", "serverapp", "proxy"),
    *("coordinator", "site", "network", "checkpoint full", "answer full", "clock"),
)
PHASES = ("opened", "working", "answered")
PATIENCE_S = 420.0
NO_SPACE = "No space left on device"
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"

Mend = Callable[[], None]


@dataclass(frozen=True)
class Done:
    """One fault and what became of it.

    Attributes:
        phase: what was going on when it struck: stage, and how many hospitals had answered.
        recovered_s: from the blow until the open stage was closed.
    """

    number: int
    kind: str
    site: str
    round: int
    phase: str
    recovered_s: float


class Wire:
    """The network between the hospitals and the coordinator: a forwarder that can be cut."""

    def __init__(self, port: int, target: int) -> None:
        self._target = target
        self._cut = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection; new ones are taken and get no answer, as behind a dead line."""
        self._cut.set()
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def restore(self) -> None:
        """The line is back."""
        self._cut.clear()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, ExitStack() as stack:
            if self._cut.is_set():
                time.sleep(2)
                return
            try:
                far = stack.enter_context(socket.create_connection(("127.0.0.1", self._target)))
            except OSError:
                return
            self._open |= {near, far}
            back = threading.Thread(target=_pump, args=(far, near), daemon=True)
            back.start()
            _pump(near, far)
            back.join()
            self._open -= {near, far}


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Bytes one way until either end is gone."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for each in (source, sink):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


class Faults:
    """The federation and what can be done to it."""

    def __init__(self, out: Path, faults: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        plan_file, data = out / "study.yaml", out / "data"
        if not plan_file.exists():
            _write_plan(plan_file, rounds=2 * faults + 5)
        if not (data / "sites.csv").exists():
            write_phantoms(data, sites=3, patients_per_site=4, shape=(24, 24, 24))
        self.data = data
        self.deployment = Deployment(out, plan_file, divide(data, out / "data-of"), say=print)
        self.deployment.set_up()
        self._disks()
        self.wire = Wire(*self._rewire())
        self.since = datetime.now(UTC)

    @property
    def plan(self) -> StudyPlan:
        return self.deployment.plan

    def _rewire(self) -> tuple[int, int]:
        """Send the hospitals' relays through the wire: its port, and the proxy's."""
        (near,) = free_ports(1)
        for name in SITES:
            link = self.deployment.site(name).link(self.plan.study)
            value = json.loads(link.read_text())
            write_atomically(link, json.dumps({**value, "address": f"localhost:{near}"}).encode())
        return near, self.deployment.coordinator.settings().port

    def _disks(self) -> None:
        """Small disks of their own for what must not be lost, where the machine permits them."""
        self.small = (self.deployment.coordinator.rounds, *(self._answers(s) for s in SITES))
        for place in self.small:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not place.is_mount() and shutil.which("mount") and os.geteuid() == 0:
                size = ["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", str(place)]
                subprocess.run(size, check=False, capture_output=True)

    def give_back(self) -> None:
        """Take the small disks away, with what is on them: the study has been concluded."""
        for place in self.small:
            if place.is_mount():
                subprocess.run(["umount", str(place)], check=False, capture_output=True)

    def _answers(self, site: str) -> Path:
        return self.deployment.site(site).answers(self.plan.study)

    def harm(self, kind: str, site: str, rng: Random) -> Mend:
        """Do it; what is returned mends it, where it does not mend itself."""
        if kind in {"superlink", "proxy", "serverapp"}:
            return self._kill(self._pid(kind, "coordinator"))
        if kind in {"relay", "trainer"}:
            return self._kill(self._pid(kind, site))
        if kind in {"coordinator", "site"}:
            name = "coordinator" if kind == "coordinator" else site
            self.deployment.kill(name)
            return lambda: self.deployment.start(name)
        if kind == "network":
            self.wire.cut()
            time.sleep(rng.uniform(3, 12))
            self.wire.restore()
            return _nothing
        if kind == "clock":
            return self._skew(site, rng)
        if kind == "checkpoint full":
            return self._fill(self.small[0], self.deployment.coordinator.log("study"))
        return self._fill(self._answers(site), self.deployment.site(site).audit)

    def _kill(self, pid: int) -> Mend:
        os.kill(pid, signal.SIGKILL)
        return _nothing

    def _pid(self, kind: str, name: str) -> int:
        """A process by what it is, below a daemon; one that is just being started is waited for."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = self._running(kind, name)
            if found is not None:
                return found
            time.sleep(0.1)
        raise LookupError(f"no {kind} runs at {name}")

    def _running(self, kind: str, name: str) -> int | None:
        """The same, if it runs now."""
        if kind == "serverapp":
            return holder(self.deployment.coordinator.study_lock) or None
        known = {
            "superlink": "flower-superlink",
            "proxy": "nginx",
            "relay": "sites.supernode",
            "trainer": "fedseg-site\0trainer",
        }
        for pid in descendants(self.deployment.pid(name)):
            with suppress(OSError):
                if known[kind] in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                    return pid
        return None

    def _fill(self, place: Path, complaints: Path) -> Mend:
        """Fill a small disk to its last byte until somebody complains; then remove the ballast."""
        ballast, before = place / "ballast", complaints.stat().st_size
        deadline = time.monotonic() + PATIENCE_S
        with ballast.open("wb", buffering=0) as stream:
            while time.monotonic() < deadline:
                for size in (1 << 20, 1 << 12, 1):  # again and again: old answers make room
                    with suppress(OSError):
                        while stream.write(bytes(size)) == size:
                            pass
                with complaints.open() as said:
                    said.seek(before)
                    if NO_SPACE in said.read():
                        return ballast.unlink
                time.sleep(0.02)
        raise TimeoutError("nobody noticed the full disk")

    def _skew(self, site: str, rng: Random) -> Mend:
        """Restart a hospital with a clock that is minutes wrong; then set it right."""
        hours = rng.choice((-1, 1)) * rng.uniform(0.2, 2)
        self.deployment.kill(site)
        wrong = {"LD_PRELOAD": FAKETIME, "FAKETIME": f"{hours:+.2f}h"}
        self.deployment.start(site, wrong)
        time.sleep(15)
        self.deployment.kill(site)
        return lambda: self.deployment.start(site)

    def possible(self, kind: str) -> bool:
        """False where this machine does not permit a kind."""
        if kind == "clock":
            return Path(FAKETIME).exists()
        return not kind.endswith("full") or all(place.is_mount() for place in self.small)


def _nothing() -> None:
    """What mends itself."""


def _write_plan(path: Path, rounds: int) -> None:
    """The tiny study, long enough, in which every hospital must answer every round."""
    value: dict[str, Any] = {
        **PLAN,
        "study": "faults",
        "aggregation": {
            **{"rounds": rounds, "minimum_sites": len(SITES), "attempts": 20},
            "round_timeout_s": PATIENCE_S,
        },
        "evaluation": {"metrics": ["dice"], "every_rounds": 10, "overlap": 0.0},
    }
    write_plan_file(path, value)


def _wait_for(faults: Faults, phase: str) -> tuple[Progress, str]:
    """Wait for a stage in the wished phase; where it stood when it was found."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        progress = faults.deployment.progress
        if progress and datetime.fromisoformat(progress.updated) < faults.since:
            progress = None  # an earlier run of this program wrote it
        stage = progress.open if progress else None
        if progress and progress.finished:
            break
        if progress and stage:
            answered = len(stage.answered)
            fits = {"opened": answered == 0, "working": answered == 0, "answered": answered > 0}
            if stage.stage != "enlist" and fits[phase]:
                return progress, f"{stage.stage}, {answered} answered"
        time.sleep(0.02)
    raise TimeoutError(f"the phase {phase!r} did not come")


def _strike(faults: Faults, number: int, kind: str, rng: Random) -> Done:
    """One fault, from the wait for its moment to the end of the stage that it hit."""
    site, phase = rng.choice(SITES), rng.choice(PHASES)
    progress, _ = _wait_for(faults, phase)
    time.sleep(rng.uniform(0, 0.3) if phase == "opened" else rng.uniform(0.5, 3))
    progress = faults.deployment.progress or progress
    stage = progress.open
    at = f"{stage.stage}, {len(stage.answered)} answered" if stage else "between stages"
    round_, closed = stage.round if stage else progress.rounds_closed, _closed(progress)
    started = time.monotonic()
    mend = faults.harm(kind, site, rng)
    mend()
    faults.deployment.wait(lambda now: _closed(now) > closed, PATIENCE_S, lambda _: None)
    return Done(number, kind, site, round_, at, round(time.monotonic() - started, 1))


def _closed(progress: Progress) -> int:
    """Stages that were closed for good."""
    return len({(record.round, record.stage) for record in progress.stages if record.answered})


def _conclude(faults: Faults, done: list[Done]) -> dict[str, Any]:
    """Finish the study and check that nothing was lost and nothing counted twice."""
    deployment, plan = faults.deployment, faults.plan
    deployment.wait(lambda progress: progress.finished, 3600, lambda _: None)
    deployment.stop_all()
    digests = {s: load_model(deployment.site(s).model(plan.study))[0].model_digest for s in SITES}
    options = Options(initial=load_initial(deployment.plan_file))
    again = deployment.folder / "simulated"
    shutil.rmtree(again, ignore_errors=True)
    simulated = simulate(plan, faults.data, again, options).model_digest
    trainings = {site: _trainings(faults, site) for site in SITES}
    study_key = VerifyKey.from_text(deployment.coordinator.study_public.read_text().strip())
    verify_chain(deployment.coordinator.audit, study_key)
    summary = {
        "faults": [asdict(each) for each in done],
        "same_model": set(digests.values()) == {simulated},
        "most_trainings_of_a_round": max(max(t.values()) for t in trainings.values()),
        "repeated_trainings": sum(sum(n - 1 for n in t.values()) for t in trainings.values()),
    }
    write_atomically(deployment.folder / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def _trainings(faults: Faults, site: str) -> dict[int, int]:
    """How often a hospital trained each round."""
    journal = faults.deployment.site(site).work(faults.plan.study) / "journal.jsonl"
    counts: dict[int, int] = {}
    for line in journal.read_text().splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if entry["event"] == "trained":
                counts[entry["round"]] = counts.get(entry["round"], 0) + 1
    return counts


def _table(done: list[Done]) -> str:
    """For each kind how often, in which phases, and the median and longest recovery."""
    lines = [
        "| fault | times | struck in | recovered, median s | longest s |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        struck = [each for each in done if each.kind == kind]
        if struck:
            seconds = [each.recovered_s for each in struck]
            phases = Counter(each.phase.replace(" answered", "") for each in struck)
            where = "; ".join(f"{phase}: {n}" for phase, n in sorted(phases.items()))
            lines.append(
                f"| {kind} | {len(struck)} | {where} | {median(seconds):.0f} | {max(seconds):.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    out, count, seed = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])
    kinds = tuple(sys.argv[4:]) or KINDS
    faults = Faults(out, count)
    note = out / "faults.jsonl"
    done = (
        [Done(**json.loads(line)) for line in note.read_text().splitlines()]
        if note.exists()
        else []
    )
    kinds = tuple(kind for kind in kinds if faults.possible(kind))
    try:
        faults.deployment.start_all()
        for number in range(len(done), count):
            rng = Random(f"{seed} {number}")
            each = _strike(faults, number, kinds[number % len(kinds)], rng)
            done.append(each)
            with note.open("a") as stream:
                stream.write(json.dumps(asdict(each)) + "\n")
            print(each, flush=True)
        summary = _conclude(faults, done)
    finally:
        faults.deployment.stop_all()
    faults.give_back()
    print(_table(done))
    print(json.dumps({key: value for key, value in summary.items() if key != "faults"}))
    assert summary["same_model"], "the final model is not the simulation's"
    rounds_lost = summary["repeated_trainings"] / len(SITES)
    assert rounds_lost <= len(done), "more than a round's work was lost to a fault"


if __name__ == "__main__":
    main()
