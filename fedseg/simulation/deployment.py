"""A real federation on one machine: a coordinator and hospitals as processes, each in its folder.

Nothing is simulated here: it types the commands that a consortium and its hospitals would type, in
their order, and every one of them is a process of its own. `make federation`, the fault runs and
the tests of the deployment all use it. What exists already is kept, so that a rehearsal that was
stopped goes on.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.folder import StudyFolder
from coordinator.progress.document import Progress, load_progress
from fedseg.errors import RoundError
from fedseg.plan import StudyPlan, load_plan
from fedseg.result import stage_words
from sites.folder import SiteFolder

LOOPBACK = "127.0.0.1"
HOST = "localhost"
_GRACE_S = 30.0

Say = Callable[[str], None]


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


@dataclass
class Deployment:
    """One study's coordinator and sites, and the daemons that run of them.

    Attributes:
        folder: gets `coordinator/` and `sites/NAME/`.
        plan_file: built; its initial model lies beside it.
        data: site -> its own data folder.
        say: is told of every command before it runs.
        environment: what every process gets besides ours.
        under: what every command is put behind, such as a tracer that runs it.
    """

    folder: Path
    plan_file: Path
    data: Mapping[str, Path]
    say: Say = lambda _line: None
    environment: Mapping[str, str] = field(default_factory=dict)
    under: Sequence[str] = ()
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def coordinator(self) -> StudyFolder:
        """The consortium's folder."""
        return StudyFolder(self.folder / "coordinator")

    def site(self, name: str) -> SiteFolder:
        """A hospital's folder."""
        return SiteFolder(self.folder / "sites" / name)

    @property
    def plan(self) -> StudyPlan:
        """The study's plan."""
        return load_plan(self.plan_file)

    @property
    def progress(self) -> Progress | None:
        """Where the study stands, or None before the coordinator has said anything."""
        return load_progress(self.coordinator.progress)

    def set_up(self) -> None:
        """From nothing to approved plans at every hospital: every key is made where it is used."""
        study = self.plan.study
        self.found()
        for name in self.data:
            self.enrol(name)
        for name in self.data:
            self.join(name)
        for name, data in self.data.items():
            self.approve(name, study, data)

    def found(self) -> None:
        """The consortium founds its study."""
        home = self.coordinator.path
        if not home.exists():
            port, inner = free_ports(2)
            self._run(
                *("fedseg-coordinator", "init", home, "--host", HOST, "--plan", self.plan_file),
                *("--port", port, "--listen", LOOPBACK, "--superlink-port", inner),
            )

    def enrol(self, name: str) -> None:
        """A hospital makes its keys, the consortium enrols it; the request travels as a file."""
        own, home = self.site(name), self.coordinator
        if not own.path.exists():
            self._run("fedseg-site", "init", own.path, "--name", name)
        if not home.bundle(name).exists():
            request = own.path / "request.json"
            self._run("fedseg-coordinator", "enrol", request, "--study", home.path, "--yes")

    def join(self, name: str) -> None:
        """A hospital takes the bundle."""
        own = self.site(name).path
        if not (own / "studies" / self.plan.study).exists():
            bundle = self.coordinator.bundle(name)
            self._run("fedseg-site", "join", bundle, "--site", own, "--yes")

    def approve(self, name: str, study: str, data: Path) -> None:
        """A hospital allows training without a privacy guarantee and approves the plan."""
        own = self.site(name).path
        if (own / "studies" / study / "approval.json").exists():
            return
        policy = own / "policy.yaml"
        self.say(f"# {policy}: privacy_none: true")
        text = policy.read_text(encoding="utf-8")
        policy.write_text(text.replace("privacy_none: false", "privacy_none: true"), "utf-8")
        self._run("fedseg-site", "plan", "approve", study, "--data", data, "--site", own)

    def start(self, name: str, extra: Mapping[str, str] | None = None) -> None:
        """Start the daemon of `coordinator` or of a site, with more in its environment."""
        place = self.coordinator.path if name == "coordinator" else self.site(name).path
        command = "fedseg-coordinator" if name == "coordinator" else "fedseg-site"
        self.say(f"$ {command} run {place} &")
        log = (self.folder / f"{name}.log").open("ab")
        with log:
            self._daemons[name] = subprocess.Popen(
                [*self.under, _script(command), "run", str(place)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment(), **(extra or {})},
                start_new_session=True,
            )

    def pid(self, name: str) -> int:
        """The process of a daemon."""
        return self._daemons[name].pid

    def start_all(self) -> None:
        """Start every daemon."""
        for name in ("coordinator", *self.data):
            self.start(name)

    def stop(self, name: str) -> int:
        """End a daemon as its administrator would; its exit status."""
        daemon = self._daemons.pop(name)
        daemon.send_signal(signal.SIGTERM)
        try:
            return daemon.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
            raise RoundError(f"the daemon of {name} did not end within {_GRACE_S:.0f} s") from None

    def stop_all(self) -> None:
        """End what runs, all at once."""
        for daemon in self._daemons.values():
            daemon.send_signal(signal.SIGTERM)
        for name in list(self._daemons):
            self.stop(name)

    def kill(self, name: str) -> None:
        """SIGKILL a daemon; what it supervises dies with it."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def wait(
        self, until: Callable[[Progress], bool], timeout_s: float, each: Callable[[Progress], None]
    ) -> Progress:
        """Wait for the study to get somewhere.

        Raises:
            RoundError: the time is up, or a daemon has ended by itself.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            progress = self.progress
            if progress is not None:
                each(progress)
                if until(progress):
                    return progress
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise RoundError(f"the daemon of {name} ended by itself:\n{self._tail(name)}")
            time.sleep(0.25)
        raise RoundError(f"the study did not get there within {timeout_s:.0f} s")

    def _run(self, *arguments: object) -> None:
        """One command of fedseg's, shown and run to its end."""
        command, *rest = map(str, arguments)
        self.say("$ " + " ".join([command, *rest]))
        done = subprocess.run(
            [*self.under, _script(command), *rest],
            capture_output=True,
            text=True,
            check=False,
            env=self._environment(),
        )
        if done.returncode:
            raise RoundError(f"{command} {rest[0]} failed: {done.stderr.strip()}")

    def _environment(self) -> dict[str, str]:
        """One thread a process, and nothing of another study of Flower's."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "FEDSEG_"))}
        return {"OMP_NUM_THREADS": "1", **kept, **self.environment}

    def _tail(self, name: str, lines: int = 15) -> str:
        """The last that a daemon said."""
        text = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])


class Watcher:
    """Says a line for each stage that was closed since it last looked."""

    def __init__(self, say: Say) -> None:
        self._say, self._seen, self._started = say, 0, time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Look at where the study stands."""
        for record in progress.stages[self._seen :]:
            answered = ", ".join(record.answered) or "nobody"
            failed = "".join(f"; {failure.site}: {failure.code}" for failure in record.failures)
            after = time.monotonic() - self._started
            where = f"round {record.round} " if record.round else ""
            dice = "" if record.dice is None else f", Dice {record.dice:.3f}"
            stage = stage_words(record.stage, record.owner)
            self._say(f"{after:6.1f} s  {where}{stage}: {answered}{dice}{failed}")
        self._seen = len(progress.stages)


def _script(command: str) -> str:
    """A command that was installed beside this Python."""
    return str(Path(sys.executable).with_name(command))
