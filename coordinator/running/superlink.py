"""Flower's SuperLink: how it is started, and what the daemon asks of it.

It listens on loopback alone, with TLS and node authentication, keeps its state in SQLite, installs
nothing and calls nobody. The app that is submitted has no code, only the names of two modules that
are installed on either side. The registry is the truth about which nodes there are: `reconcile`
registers what is missing and removes what is not on the roll, so it may be asked at any time.

The daemon speaks Flower's Control API itself instead of starting `flwr` for every question: a call
takes milliseconds, a command a second or more of CPU. The configuration that is written beside it
lets an operator ask the same with `flwr`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sysconfig
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from coordinator.app import STUDY_VARIABLE
from coordinator.folder import Settings, StudyFolder
from fedseg.durable import write_atomically
from fedseg.errors import FedsegError
from fedseg.quiet import QUIET
from fedseg.security.documents import stamp
from fedseg.security.identity import Roll
from fedseg.shell import PASSPHRASE_FILE

HOST = "127.0.0.1"
CONNECTION = "study"
_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "TZ", "COVERAGE_PROCESS_START", PASSPHRASE_FILE)
_POLL_S = "0.1"
_APP = """\
[project]
name = "fedseg-study"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedseg"

[tool.flwr.app.components]
serverapp = "coordinator.app:app"
clientapp = "sites.app:app"

[tool.flwr.app.config]
"""
_CONNECTIONS = """\
[superlink]
default = "{name}"
[superlink.{name}]
address = "{address}"
root-certificates = {ca}
"""


class SuperLinkError(FedsegError):
    """The SuperLink does not answer, or refuses; it will be asked again."""


@dataclass(frozen=True)
class Node:
    """A node that the SuperLink knows. `key`: its public key, PEM; `last_seen`: ISO 8601 or ''."""

    node_id: int
    name: str
    key: bytes
    online: bool
    last_seen: str


@dataclass(frozen=True)
class Changed:
    """Sites whose nodes were registered and nodes that were removed, by name."""

    registered: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def superlink_command(folder: StudyFolder, settings: Settings) -> tuple[str, ...]:
    """The command line of the SuperLink."""
    return (
        str(Path(sysconfig.get_path("scripts")) / "flower-superlink"),
        *("--host", HOST, "--port", str(settings.superlink_port)),
        *("--ssl-certfile", str(folder.server_certificate)),
        *("--ssl-keyfile", str(folder.server_key)),
        *("--ssl-ca-certfile", str(folder.ca_certificate)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--database", str(folder.flower_database)),
    )


def superlink_environment(folder: StudyFolder) -> dict[str, str]:
    """All that SuperLink, SuperExec and ServerApp are told; nothing of a proxy server, say."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    scripts = sysconfig.get_path("scripts")
    return {
        **passed,
        **QUIET,
        "PATH": os.pathsep.join((scripts, passed.get("PATH", os.defpath))),
        "FLWR_HOME": str(folder.flower),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _POLL_S,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        STUDY_VARIABLE: str(folder.path),
    }


def write_flower(folder: StudyFolder, settings: Settings) -> None:
    """Write the thin app and the configuration for an operator's `flwr`.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder.flower.mkdir(mode=0o700, exist_ok=True)
    write_atomically(folder.flower_app / "pyproject.toml", _APP.encode())
    address, ca = f"{HOST}:{settings.superlink_port}", json.dumps(str(folder.ca_certificate))
    text = _CONNECTIONS.format(name=CONNECTION, address=address, ca=ca)
    write_atomically(folder.flower / "config.toml", text.encode())


def listens(port: int) -> bool:
    """Whether something on loopback takes connections; uvicorn does once it has started up."""
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((HOST, port)) == 0


class SuperLink:
    """The Control API of one study's SuperLink. Every call raises SuperLinkError where it fails."""

    def __init__(self, folder: StudyFolder, settings: Settings) -> None:
        self._folder, self._settings = folder, settings

    def nodes(self) -> list[Node]:
        """Every registered node."""
        return [
            Node(
                node_id=info.node_id,
                name=info.name,
                key=bytes(info.public_key),
                online=info.status == "online",
                last_seen=_last_seen(info),
            )
            for info in self._ask("ListNodes", ListNodesRequest()).nodes_info
            if info.status != "unregistered"
        ]

    def reconcile(self, roll: Roll) -> Changed:
        """Make the registered nodes the ones that are on the roll."""
        wanted = {_pem(site.node): site.name for site in roll.sites}
        known = {node.key: node for node in self.nodes()}
        strangers = [node for key, node in known.items() if key not in wanted]
        missing = {key: name for key, name in wanted.items() if key not in known}
        for node in strangers:
            request = UnregisterNodeRequest(node_id=node.node_id)
            self._ask("UnregisterNode", request, fine=(ApiErrorCode.NODE_NOT_FOUND,))
        for key, name in missing.items():
            new = RegisterNodeRequest(public_key=key, name=name)
            self._ask("RegisterNode", new, fine=(ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE,))
        return Changed(
            registered=tuple(sorted(missing.values())),
            removed=tuple(sorted(node.name for node in strangers)),
        )

    def submit(self) -> int:
        """Start a run of the thin app; its id."""
        app = build_fab_from_disk(self._folder.flower_app)
        fab = Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app)
        return int(self._ask("StartRun", StartRunRequest(fab=fab)).run_id)

    def ended(self, run: int) -> str | None:
        """How a run ended, in Flower's words; None while it has not."""
        unknown = (ApiErrorCode.RUN_ID_NOT_FOUND,)
        found = self._ask("ListRuns", ListRunsRequest(run_id=run), fine=unknown)
        if found is None:
            return "unknown to the SuperLink"
        status = found.run_dict[run].status
        ended = status.status == "finished"
        return f"{status.sub_status} {status.details}".strip() if ended else None

    def stop(self, run: int) -> None:
        """End a run and forget its messages; one that has ended already stays so."""
        fine = (ApiErrorCode.RUN_ALREADY_FINISHED, ApiErrorCode.RUN_ID_NOT_FOUND)
        self._ask("StopRun", StopRunRequest(run_id=run), fine=fine)

    def stop_all(self) -> int:
        """End every run that has not; how many there were."""
        runs = self._ask("ListRuns", ListRunsRequest()).run_dict
        left = [run for run, seen in runs.items() if seen.status.status != "finished"]
        for run in left:
            self.stop(run)
        return len(left)

    def _ask(self, method: str, request: object, fine: tuple[int, ...] = ()) -> Any:
        """One call; an error of a code that is fine is none, and there is no reply then.

        Raises:
            SuperLinkError: no answer, or another error.
        """
        client = ControlHttpClient.from_server_address(
            f"{HOST}:{self._settings.superlink_port}",
            insecure=False,
            root_certificates=self._folder.ca_certificate.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        try:
            return getattr(client, method)(request)
        except httpx.HTTPStatusError as error:
            refusal = FlowerError.from_json(error.response.text)
            if refusal is not None and refusal.code in (
                fine if isinstance(fine, tuple) else (fine,)
            ):
                return None
            said = refusal.message if refusal else f"HTTP status {error.response.status_code}"
            raise SuperLinkError(f"the SuperLink refuses {method}: {said}") from None
        except (httpx.HTTPError, ValueError) as error:
            kind = type(error).__name__
            raise SuperLinkError(f"the SuperLink does not answer {method}: {kind}") from None
        finally:
            client.close()


def _pem(line: str) -> bytes:
    """A node's public key as the SuperLink stores it, from its OpenSSH line."""
    key = load_ssh_public_key(line.encode())
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _last_seen(info: NodeInfo) -> str:
    """When a node's last sign of life came: it promised the next one for `online_until`."""
    if not info.online_until:
        return ""
    moment = info.online_until - HEARTBEAT_PATIENCE * info.heartbeat_interval
    return stamp(datetime.fromtimestamp(moment, UTC))
