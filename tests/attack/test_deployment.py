"""Hostile peers against a real federation: processes by the real commands, over real TLS.

Each attack is refused and leaves a line where somebody of ours sees it: in the audit of the site or
of the coordinator, or, for what never gets past the door, in the log of the proxy or of the relay.
Everything is done to one federation, paused after its first round; at the end it must finish its
study as if nothing had happened. What an app bundle with code of its own meets is shown in
tests/integration/test_separation.py.
"""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from besieged import HONEST, LIAR, ROUNDS, STUDY, Besieged
from flwr.proto.control_pb2 import (
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from fuzzing import request
from small_hospitals import Consortium
from traces import ours, reached

from coordinator.office.registry import current_roll
from coordinator.running.superlink import SuperLink
from fedseg.container import peek
from fedseg.planfile import load_initial
from fedseg.security.certificates import make_ca, make_server_certificate
from fedseg.security.identity import SignedRoll
from fedseg.security.keys import SigningKey
from fedseg.security.nodekeys import make_node_key
from fedseg.simulation.deployment import free_ports
from fedseg.updates import AnswerHeader
from sites.client import Door
from sites.keyring import own_identity
from sites.relay import what_it_says
from sites.standing import standing

pytestmark = pytest.mark.timeout(500)
SITE = HONEST[0]


@pytest.fixture(scope="module")
def consortium(federation: Besieged) -> Consortium:
    """Whoever holds the study key, gone bad."""
    model = load_initial(federation.deployment.plan_file)
    return Consortium(federation.deployment.plan, model, key=federation.study_key)


@pytest.fixture(scope="module")
def roll(federation: Besieged) -> SignedRoll:
    return current_roll(federation.deployment.coordinator)


def post(federation: Besieged, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    """What a relay that was taken over can say to its trainer."""
    connection = Door(f"unix:{federation.site(SITE).socket}").connection(60)
    with closing(connection):
        connection.connect()
        with suppress(BrokenPipeError, ConnectionResetError):  # it may refuse before the end
            connection.request("POST", path, body=body, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()


class TestTheTrainer:
    """What reaches the socket of a running trainer."""

    def _refused(self, federation: Besieged, status: int, path: str, body: bytes) -> str:
        """Refused with a status and no word, nothing trained; the reason in the audit."""
        before = len(federation.audit(SITE, "refused"))
        assert post(federation, path, body) == (status, b"")
        assert federation.trained(SITE) == [1]
        entries = federation.audit(SITE, "refused")
        assert len(entries) == before + 1
        return str(entries[-1].facts["reason"])

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"signer": SigningKey.generate()}, "signature"),
            ({"study": "other"}, "other"),
            ({"recipients": None}, "sealed for"),
            ({"reply_to": None}, "where to answer"),
        ],
        ids=["another key", "another study", "another site's", "no receiving key"],
    )
    def test_a_strangers_task(
        self,
        changes: dict[str, Any],
        reason: str,
        federation: Besieged,
        consortium: Consortium,
        roll: SignedRoll,
    ) -> None:
        own, other = (own_identity(federation.site(name)) for name in HONEST)
        to = other if "recipients" in changes else own
        changes = {key: value for key, value in changes.items() if key != "recipients"}
        body = consortium.seal(consortium.plain("train", 2), to, roll, **changes)
        assert reason in self._refused(federation, 403, f"/studies/{STUDY}/tasks", body)

    def test_a_task_for_a_study_that_was_not_joined(self, federation: Besieged) -> None:
        reason = self._refused(federation, 404, "/studies/other/tasks", federation.tasks[0])
        assert "not joined" in reason

    def test_an_oversized_task(self, federation: Besieged) -> None:
        body = federation.tasks[0] + bytes(8_000_000)
        assert "larger" in self._refused(federation, 413, f"/studies/{STUDY}/tasks", body)

    @pytest.mark.parametrize("code", ["plan", "roster"])
    def test_an_authentic_task_under_what_was_not_approved(
        self, code: str, federation: Besieged, consortium: Consortium, roll: SignedRoll
    ) -> None:
        """Signed by the study key: it gets an answer, sealed, and in it one coarse code."""
        own = own_identity(federation.site(SITE))
        under = consortium.roll(own, version=9) if code == "roster" else roll
        changes = {"plan": "f" * 64} if code == "plan" else {}
        body = consortium.seal(consortium.plain("train", 2), own, under, **changes)
        status, answer = post(federation, f"/studies/{STUDY}/tasks", body)
        said = peek(consortium.read(answer, own), AnswerHeader, max_bytes=10**6).body
        assert (status, said.kind, getattr(said, "code", "")) == (200, "refused", code)
        assert federation.audit(SITE, "refused")[-1].facts["code"] == code
        assert federation.trained(SITE) == [1]

    def test_a_replayed_task_trains_nothing(self, federation: Besieged) -> None:
        """The very bytes that the coordinator sent get the very bytes that were answered."""
        before = len(federation.audit(SITE, "repeated"))
        path = f"/studies/{STUDY}/tasks"
        answers = {post(federation, path, federation.tasks[0]) for _ in range(3)}
        ((status, answer),) = answers
        stored = [file.read_bytes() for file in _answers(federation)]
        assert status == 200 and answer in stored
        assert federation.trained(SITE) == [1]
        assert len(federation.audit(SITE, "repeated")) == before + 3


def _answers(federation: Besieged) -> list[Path]:
    return list(federation.site(SITE).answers(STUDY).rglob("*.sealed"))


class TestNodes:
    """Who wants to be a node of the SuperLink, and whom a relay takes for the coordinator."""

    def test_only_enrolled_nodes_and_the_studys_own_certificate(
        self, federation: Besieged, tmp_path: Path
    ) -> None:
        """An unenrolled key, a coordinator of another CA, and one whose certificate expired."""
        folder, coordinator = federation.site(LIAR), federation.deployment.coordinator
        now = datetime.now(UTC)
        ca = coordinator.ca_key.read_bytes(), coordinator.ca_certificate.read_bytes()
        expired = make_server_certificate(*ca, ["localhost"], now - timedelta(days=9), days=8)
        foreign = make_server_certificate(*make_ca(STUDY, now), ["localhost"], now)
        make_node_key(tmp_path / "stranger.key")
        before = len(federation.refused_by_proxy())
        ports = [str(port) for port in free_ports(3)]
        with (
            FalseServer(tmp_path, "expired", expired) as old,
            FalseServer(tmp_path, "foreign", foreign) as false,
        ):
            changes: Mapping[str, dict[str, str]] = {
                "stranger": {"auth_supernode_private_key": str(tmp_path / "stranger.key")},
                "expired": {"superlink": f"localhost:{old.port}"},
                "foreign": {"superlink": f"localhost:{false.port}"},
            }
            nodes = {
                name: federation.supernode(
                    folder, tmp_path / f"{name}.log", port=port, **changes[name]
                )
                for port, name in zip(ports, changes, strict=True)
            }
            assert all(_ended(node) for node in nodes.values())
        said = {name: what_it_says((tmp_path / f"{name}.log").read_text()) for name in nodes}
        assert said == {"stranger": "refused", "expired": "certificate", "foreign": "certificate"}
        assert old.connections and false.connections and not old.heard + false.heard
        lines = federation.refused_by_proxy()[before:]
        assert any('"POST /v1/fleet/activate-node HTTP/1.1" 4' in line for line in lines), lines
        assert {node.name for node in _superlink(federation).nodes()} == {*HONEST, LIAR}

    def test_who_answers_under_anothers_name(self, federation: Besieged) -> None:
        """The liar's answers are signed, by the liar: the coordinator names the node it came by."""
        refused = federation.audit("coordinator", "answer_refused")
        lies = [entry.facts for entry in refused if entry.facts["code"] == "signature"]
        assert lies and {(fact["round"], fact["stage"]) for fact in lies} == {(0, "enlist")}
        counted = {e.facts["site"] for e in federation.audit("coordinator", "answer_received")}
        assert counted == set(HONEST)

    def test_a_revoked_node_is_off_line_at_once(self, federation: Besieged, tmp_path: Path) -> None:
        """The same key, a moment ago on line, is a stranger's."""
        home = federation.deployment.coordinator.path
        done = federation.command(
            *("fedseg-coordinator", "revoke", LIAR, "--reason", "it lies", "--study", home)
        )
        assert done.returncode == 0, done.stderr
        assert federation.relay is not None
        _until(lambda: {n.name for n in _superlink(federation).nodes()} == set(HONEST))
        before = len(federation.refused_by_proxy())
        (port,) = free_ports(1)
        again = federation.supernode(federation.site(LIAR), tmp_path / "log", port=str(port))
        assert _ended(again)
        assert what_it_says((tmp_path / "log").read_text()) == "refused"
        lines = federation.refused_by_proxy()[before:]
        assert any('"POST /v1/fleet/activate-node HTTP/1.1" 4' in line for line in lines), lines
        assert federation.audit("coordinator", "revoked")[-1].facts["site"] == LIAR


class TestTheControlApi:
    """Flower's own calls, from outside, where only the proxy's port is reached."""

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ("StartRun", StartRunRequest(fab=Fab(hash_str="0" * 64, content=b"PK"))),
            ("RegisterNode", RegisterNodeRequest(public_key=b"x", name="evil")),
            ("StopRun", StopRunRequest(run_id=1)),
            ("UnregisterNode", UnregisterNodeRequest(node_id=1)),
            ("ListRuns", ListRunsRequest()),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_call_meets_a_404_and_is_logged(
        self, call: str, message: object, federation: Besieged
    ) -> None:
        folder = federation.deployment.coordinator
        before = len(federation.refused_by_proxy())
        client = ControlHttpClient.from_server_address(
            f"localhost:{folder.settings().port}",
            insecure=False,
            root_certificates=folder.ca_certificate.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        with pytest.raises(httpx.HTTPStatusError) as refused:
            getattr(client, call)(message)
        client.close()
        assert refused.value.response.status_code == 404
        _until(lambda: len(federation.refused_by_proxy()) > before)  # written after the reply
        lines = federation.refused_by_proxy()[before:]
        assert any('"POST /v1/control/' in line and '" 404' in line for line in lines), lines

    def test_flwr_run_from_outside_starts_nothing(
        self, federation: Besieged, tmp_path: Path
    ) -> None:
        """Flower's command line with the study's own CA, and an app that would be code at sites."""
        folder, before = federation.deployment.coordinator, _runs(federation)
        lines = len(federation.refused_by_proxy())
        (tmp_path / "config.toml").write_text(
            f'[superlink]\ndefault = "x"\n[superlink.x]\naddress = '
            f'"localhost:{folder.settings().port}"\nroot-certificates = "{folder.ca_certificate}"\n'
        )
        environment = {
            **{"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0"},
            **{"FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        }
        ran = subprocess.run(
            [_beside("flwr"), "run", str(folder.flower_app), "x"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert ran.returncode != 0
        refused = "\n".join(federation.refused_by_proxy()[lines:])
        assert re.search(r'"POST /v1/control/[a-z-]+ HTTP/1\.1" 404', refused), ran.stderr
        assert _runs(federation) == before


class TestSockets:
    """Malformed requests with everything real behind the sockets."""

    def test_nothing_ends_and_the_trainer_answers_on(self, federation: Besieged) -> None:
        folder, rng = federation.site(SITE), Random("20260503 federation")
        settings = federation.deployment.coordinator.settings()
        trust = ssl.create_default_context(cafile=folder.ca(STUDY))
        before = {name: standing(federation.site(name)) for name in HONEST}
        paths = [f"/studies/{STUDY}/tasks", "/v1/fleet/pull-messages", "/v1/fleet/push-object"]
        doors: dict[str, Callable[[], socket.socket]] = {
            "trainer": lambda: _unix(folder.socket),
            "relay": lambda: _loopback(folder.link_of(STUDY).port),
            "superlink": lambda: trust.wrap_socket(
                _loopback(settings.superlink_port), server_hostname="localhost"
            ),
            "proxy": lambda: trust.wrap_socket(
                _loopback(settings.port), server_hostname="localhost"
            ),
        }
        for connect in doors.values():
            for _ in range(25):
                data = request(rng, paths, [federation.tasks[0][:500], b"x" * 2000])
                answer = _say(connect, data)
                assert b"Traceback" not in answer and bytes(folder.path) not in answer
        _until(
            lambda: all(standing(federation.site(name))["trainer"]["answers"] for name in HONEST)
        )
        for name in HONEST:
            now = standing(federation.site(name))
            assert now["trainer"]["restarts"] == before[name]["trainer"]["restarts"]
            assert now["studies"][STUDY]["relay"] == "on line"
        assert "Traceback" not in folder.trainer_log.read_text()
        assert federation.trained(SITE) == [1]


def test_after_all_this_the_study_ends_as_it_should(federation: Besieged) -> None:
    """Every round trained once, the model at both hospitals, every audit whole, nobody called."""
    deployment = federation.deployment
    deployment.coordinator.paused.unlink()
    deployment.wait(lambda now: now.finished, 200, lambda _: None)
    for name in HONEST:
        assert federation.trained(name) == list(range(1, ROUNDS + 1))
        assert federation.site(name).model(STUDY).exists()
        assert [e.facts["stage"] for e in federation.audit(name, "answered")].count(
            "train"
        ) == ROUNDS
    sites = {e.facts["site"] for e in federation.audit("coordinator", "answer_received")}
    assert sites == set(HONEST)
    if deployment.under:
        assert reached(federation.trace) <= ours(federation)


@dataclass
class FalseServer:
    """Somebody else with a certificate for the coordinator's name; it notes what it is told."""

    folder: Path
    name: str
    pair: tuple[bytes, bytes]
    heard: list[bytes] = field(default_factory=list)
    connections: int = 0

    def __enter__(self) -> FalseServer:
        key, certificate = self.folder / f"{self.name}.key", self.folder / f"{self.name}.crt"
        key.write_bytes(self.pair[0])
        certificate.write_bytes(self.pair[1])
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with suppress(OSError, ssl.SSLError), plain:
                plain.settimeout(5)
                with self._context.wrap_socket(plain, server_side=True) as secure:
                    if data := secure.recv(1000):
                        self.heard.append(data)


def _ended(node: subprocess.Popen[bytes]) -> bool:
    """Whether a SuperNode gave up by itself, with an error."""
    try:
        return node.wait(120) != 0
    finally:
        node.kill()


def _until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _superlink(federation: Besieged) -> SuperLink:
    """The SuperLink as its own daemon asks it, over loopback."""
    folder = federation.deployment.coordinator
    return SuperLink(folder, folder.settings())


def _runs(federation: Besieged) -> int:
    """How many runs the SuperLink has ever had."""
    found = _superlink(federation)._ask("ListRuns", ListRunsRequest())
    return len(found.run_dict)


def _beside(command: str) -> str:
    """A command that was installed beside this Python."""
    return str(Path(sys.executable).with_name(command))


def _unix(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(path))
    return peer


def _loopback(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def _say(connect: Callable[[], socket.socket], data: bytes) -> bytes:
    """Say this and hang up a moment later."""
    received = b""
    with suppress(OSError, ssl.SSLError), connect() as peer:
        peer.settimeout(0.1)
        peer.sendall(data)
        while chunk := peer.recv(65536):
            received += chunk
    return received
