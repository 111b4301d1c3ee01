"""A real federation that tests attack: processes by the real commands, over TLS, under a tracer.

Two honest hospitals, and a third whose trainer lies: it is enrolled and on line with Flower's own
SuperNode, but gives its answers out as hospital_a's. The study is paused after its first round of
training, so that every attack meets a federation that stands still, and must end afterwards.
"""

from __future__ import annotations

import shutil
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from small_hospitals import PLAN_VALUES

from coordinator.progress.document import Progress
from coordinator.running.superlink import SuperLink, SuperLinkError
from fedseg.chain import Entry, verify_chain
from fedseg.commands.federation import write_plan_file
from fedseg.imaging.phantoms import write_phantoms
from fedseg.security.envelope import open_bytes, seal_bytes
from fedseg.security.keys import (
    SealingKey,
    SigningKey,
    VerifyKey,
    load_receiving_key,
    load_signing_key,
)
from fedseg.security.nodekeys import make_node_key
from fedseg.simulation.deployment import Deployment
from fedseg.simulation.hospitals import divide
from fedseg.updates import AnswerHeader, Enlisted, seal_answer
from sites.enrolment import pinned_bundle
from sites.folder import SiteFolder
from sites.journal import Journal
from sites.relay import relay_of

HONEST, LIAR = ("hospital_a", "hospital_b"), "hospital_c"
STUDY = "tiny"
ROUNDS = 2
CALLS = "connect,bind,sendto,sendmsg,sendmmsg"


@dataclass
class Besieged:
    """The federation while it is attacked.

    Attributes:
        trace: what the tracer saw, a file a process; empty where there is no tracer.
        tasks: sealed tasks of the first training round as they lay in the coordinator's outbox.
    """

    deployment: Deployment
    trace: Path
    tasks: list[bytes] = field(default_factory=list)
    relay: subprocess.Popen[bytes] | None = None

    @property
    def study_key(self) -> SigningKey:
        """The key that everything hangs on; tests use it as a coordinator gone bad would."""
        return load_signing_key(self.deployment.coordinator.study_key)

    def site(self, name: str) -> SiteFolder:
        """A hospital's folder."""
        return self.deployment.site(name)

    def trained(self, name: str) -> list[int]:
        """The rounds that a hospital trained, by its own journal."""
        journal = Journal(self.site(name).work(STUDY) / "journal.jsonl")
        return [int(str(entry["round"])) for entry in journal.read("trained")]

    def audit(self, name: str, event: str) -> list[Entry]:
        """The entries of one kind in the audit of a site or of `coordinator`, verified."""
        coordinator = self.deployment.coordinator
        if name == "coordinator":
            key = VerifyKey.from_text(coordinator.study_public.read_text().strip())
            entries = verify_chain(coordinator.audit, key)
        else:
            folder = self.site(name)
            entries = verify_chain(folder.audit, load_signing_key(folder.signing_key).public)
        return [entry for entry in entries if entry.event == event]

    def refused_by_proxy(self) -> list[str]:
        """The lines that the proxy wrote of requests it, or the SuperLink behind it, refused."""
        return self.deployment.coordinator.log("proxy").read_text().splitlines()

    def command(self, *words: object) -> subprocess.CompletedProcess[str]:
        """One command of ours, run to its end."""
        program, *rest = map(str, words)
        script = str(Path(sys.executable).with_name(program))
        return subprocess.run(
            [script, *rest], capture_output=True, text=True, timeout=60, check=False
        )

    def supernode(self, folder: SiteFolder, log: Path, **changed: str) -> subprocess.Popen[bytes]:
        """Flower's SuperNode as a site's relay starts it, some options given another value."""
        relay = relay_of(folder, STUDY, {})
        command = list(relay.command)
        for option, value in changed.items():
            command[command.index(f"--{option.replace('_', '-')}") + 1] = value
        with log.open("wb") as out:
            return subprocess.Popen(command, env=relay.environment, stdout=out, stderr=out)

    def stranger_key(self, path: Path) -> str:
        """A node key that nobody enrolled."""
        make_node_key(path)
        return str(path)


def besiege(folder: Path) -> Iterator[Besieged]:
    """Start everything, wait for the first round of training, pause, and hand it over."""
    data, plan_file = folder / "data", folder / "study.yaml"
    write_phantoms(data, sites=2, patients_per_site=3, shape=(20, 20, 20))
    value = {**PLAN_VALUES, "aggregation": {**PLAN_VALUES["aggregation"], "rounds": ROUNDS}}
    value["aggregation"]["round_timeout_s"] = 240.0
    plan = write_plan_file(plan_file, value)
    trace = folder / "trace"
    deployment = Deployment(folder, plan_file, divide(data, folder / "of"), under=tracer(trace))
    deployment.found()
    deployment.enrol(LIAR)
    deployment.set_up()
    deployment.join(LIAR)
    found = Besieged(deployment, trace)
    with _Liar(deployment.site(LIAR), plan.digest):
        try:
            watching = threading.Thread(target=_keep_tasks, args=(found,), daemon=True)
            watching.start()
            deployment.start("coordinator")
            _until_liar(found, online=False)  # or it is refused, and ends
            found.relay = found.supernode(found.site(LIAR), folder / "liar.log")
            _until_liar(found, online=True)  # so that it is asked when the sites enlist
            for name in HONEST:
                deployment.start(name)
            deployment.wait(_trains, 200, _nothing)
            deployment.coordinator.paused.touch()
            deployment.wait(lambda now: now.phase == "paused", 60, _nothing)
            yield found
        finally:
            if found.relay:
                found.relay.terminate()
                found.relay.wait(30)
            deployment.stop_all()


def tracer(trace: Path) -> tuple[str, ...]:
    """What has every command watched that connects, binds or sends to an address; () without.

    The tracer is a grandchild, so that the traced program is the one that was started.
    """
    strace = shutil.which("strace")
    if strace is None:
        return ()
    trace.mkdir()
    what = ("-e", f"trace={CALLS}", "-e", "signal=none", "-s", "200")
    command = (strace, "-D", "-ff", "--seccomp-bpf", "-qq", *what, "-o", str(trace / "of"))
    permitted = subprocess.run([*command, "true"], check=False, capture_output=True).returncode == 0
    return command if permitted else ()


def _until_liar(found: Besieged, *, online: bool) -> None:
    """Wait until the liar's node is known to the SuperLink, or on line there."""
    folder, deadline = found.deployment.coordinator, time.monotonic() + 120
    superlink = SuperLink(folder, folder.settings())
    while time.monotonic() < deadline:
        with suppress(SuperLinkError):
            if any(n.name == LIAR and n.online >= online for n in superlink.nodes()):
                return
        time.sleep(0.2)
    raise TimeoutError("the liar's node does not come on line")


def _trains(progress: Progress) -> bool:
    """Is the first round of training open?"""
    return progress.open is not None and progress.open.stage == "train"


def _nothing(_progress: Progress) -> None:
    """Progress is not shown."""


def _keep_tasks(found: Besieged) -> None:
    """Copy the sealed tasks of training as they lie in the outbox: what any relay sees too."""
    outbox = found.deployment.coordinator.outbox
    while not found.tasks:
        for path in outbox.glob("*train*.task") if outbox.is_dir() else ():
            with suppress(OSError):
                found.tasks.append(path.read_bytes())
        time.sleep(0.02)


class _Liar:
    """A trainer on the liar's own socket: real keys, and another hospital's name."""

    def __init__(self, folder: SiteFolder, plan: str) -> None:
        receiving, signing = (
            load_receiving_key(folder.receiving_key),
            load_signing_key(folder.signing_key),
        )
        study_key = VerifyKey.from_text(pinned_bundle(folder, STUDY).study_key)

        def answer(envelope: bytes) -> bytes:
            header, _ = open_bytes(
                envelope, kind="task", study=STUDY, signer=study_key, recipient=LIAR,
                key=receiving, max_bytes=10**8,
            )  # fmt: skip
            assert header.reply_to
            body = Enlisted(patients={"train": 4}, cases={"train": 4}, left_out=0)
            plain = seal_answer(AnswerHeader(task=header.about, site=HONEST[0], body=body))
            return seal_bytes(
                plain, kind="answer", study=STUDY, plan=plan, roll=header.roll, about=header.about,
                sender=HONEST[0], recipients={"coordinator": SealingKey.from_text(header.reply_to)},
                signer=signing,
            )  # fmt: skip

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                said = answer(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def address_string(self) -> str:
                return "relay"

            def log_message(self, *_: object) -> None:
                """Quiet."""

        folder.run.mkdir(exist_ok=True)
        self._server = socketserver.ThreadingUnixStreamServer(str(folder.socket), Handler)

    def __enter__(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
