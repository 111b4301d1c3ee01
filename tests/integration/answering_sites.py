"""Hospitals for the coordinator's tests: real SuperNodes and relays, real keys, no training.

In the place of the trainer stands a small server that opens every task with the site's own keys
and answers what a good site would, with an update drawn from the site's name and the round.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from small_plans import answer, body_of, built_plan, tiny_model
from small_studies import write_built

from coordinator.folder import StudyFolder, new_settings
from coordinator.office.enrolment import register
from coordinator.office.founding import found
from fedseg.arrays import digest_of
from fedseg.plan import StudyPlan
from fedseg.security.documents import stamp
from fedseg.security.envelope import open_bytes, seal_bytes
from fedseg.security.identity import SiteIdentity, make_request
from fedseg.security.keys import ReceivingKey, SealingKey, SigningKey, load_signing_key
from fedseg.security.nodekeys import make_node_key
from fedseg.supervision import Program
from fedseg.updates import open_task, task_digest
from sites.relay import QUIET

MOST = 10_000_000


@dataclass
class Site:
    """One hospital's keys, its stand-in for a trainer, and the command of its relay."""

    name: str
    folder: Path
    study: StudyFolder
    plan: StudyPlan
    port: int
    signing: SigningKey = field(default_factory=SigningKey.generate)
    receiving: ReceivingKey = field(default_factory=ReceivingKey.generate)
    served: list[tuple[str, int]] = field(default_factory=list)
    hold: Callable[[str, int], None] = lambda _stage, _round: None
    node: str = ""

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "token").write_text("word")
        self.node = make_node_key(self.folder / "node.key")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _door(self.answer))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def identity(self) -> SiteIdentity:
        return SiteIdentity(
            name=self.name,
            signing=self.signing.public.text,
            sealing=self.receiving.public.text,
            node=self.node,
        )

    @property
    def request(self) -> bytes:
        return make_request(self.identity, self.signing, stamp(datetime.now(UTC)))

    @property
    def relay(self) -> Program:
        """flower-supernode, dialling the proxy."""
        where, home = self._server.server_address[1], self.folder / "flower"
        home.mkdir(exist_ok=True)
        scripts = Path(sys.executable).parent
        config = f'study="tiny" trainer="127.0.0.1:{where}" token-file="{self.folder}/token"'
        return Program(
            f"relay-{self.name}",
            (
                str(scripts / "flower-supernode"),
                *("--superlink", self.study.settings().address),
                *("--root-certificates", str(self.study.ca_certificate)),
                *("--auth-supernode-private-key", str(self.folder / "node.key")),
                *("--host", "127.0.0.1", "--port", str(self.port)),
                *("--node-config", config),
            ),
            {
                **QUIET,
                "FLWR_HOME": str(home),
                "HOME": str(home),
                "PATH": f"{scripts}:/usr/bin:/bin",
                "OMP_NUM_THREADS": "1",
            },
            self.folder / "relay.log",
            backoff_s=2.0,
            max_backoff_s=4.0,
        )

    def answer(self, data: bytes) -> bytes:
        """Open a task, answer it, seal the answer."""
        study_key = self.study_key
        header, task = open_bytes(
            data,
            kind="task",
            study="tiny",
            signer=study_key,
            recipient=self.name,
            key=self.receiving,
            max_bytes=MOST,
        )
        plain = self.plain_answer(task)
        assert header.reply_to is not None
        return seal_bytes(
            plain,
            kind="answer",
            study="tiny",
            plan=header.plan,
            roll=header.roll,
            about=header.about,
            sender=self.name,
            recipients={"coordinator": SealingKey.from_text(header.reply_to)},
            signer=self.signing,
        )

    def plain_answer(self, task: bytes) -> bytes:
        """What a good site says."""
        header, model = open_task(task, self.plan)
        self.hold(header.stage, header.round)
        self.served.append((header.stage, header.round))
        digest = digest_of(model) if model else None
        body = body_of(header.stage, model=digest)
        delta = self.update(header.round) if header.stage == "train" else None
        return answer(task_digest(task), self.name, body, delta)

    def update(self, round_: int) -> dict[str, np.ndarray]:
        seed = int.from_bytes(hashlib.sha256(f"{self.name} {round_}".encode()).digest()[:4])
        return {name: 0.1 * value for name, value in tiny_model(seed).items()}

    @property
    def study_key(self):
        return load_signing_key(self.study.study_key).public

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _door(handle: Callable[[bytes], bytes]) -> type[BaseHTTPRequestHandler]:
    """What sites.client speaks to."""

    class Door(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            said = handle(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return Door


def a_study(path: Path, port: int, superlink_port: int, **changes: object) -> StudyFolder:
    """A study on loopback that nobody has enrolled in."""
    plan = built_plan(tiny_model(), **changes)
    settings = new_settings(
        study="tiny",
        host="localhost",
        port=port,
        listen="127.0.0.1",
        superlink_port=superlink_port,
        created=stamp(datetime.now(UTC)),
    )
    folder = StudyFolder(path)
    found(folder, write_built(path.with_name("plan.json"), plan), settings, now=datetime.now(UTC))
    return folder


@contextmanager
def enrolled(folder: StudyFolder, *names: str, ports: list[int]) -> Iterator[list[Site]]:
    """Sites that the study has enrolled; their relays are still to be started."""
    plan, key = folder.plan(), load_signing_key(folder.study_key)
    sites = [
        Site(name, folder.path.with_name(name), folder, plan, port)
        for name, port in zip(names, ports, strict=True)
    ]
    try:
        for site in sites:
            register(folder, site.request, key, datetime.now(UTC))
        yield sites
    finally:
        for site in sites:
            site.close()
