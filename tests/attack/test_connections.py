"""Every attempt of every process of a running federation to reach anything is looked at.

All commands, from `init` to the daemons, and whatever they start run under strace, which stops at
each connect, bind and send to an address and writes it down, also where it fails. Allowed are the
coordinator's port, the SuperLink's and the relays' own on loopback, the trainers' Unix sockets, and
what the C library asks of this machine. A name server, telemetry or an update check would show.

What this cannot see: calls by io_uring (nothing here is built on it), raw packets by a driver, what
a process outside the federation does on request (a name service daemon of this machine, say), and
studies that run otherwise than this one. Where strace is missing or not permitted the test skips.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from besieged import HONEST, LIAR, Besieged, tracer
from traces import attempts, ours, ports, reached

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def seen(federation: Besieged) -> Counter[tuple[str, str]]:
    if not federation.deployment.under:
        pytest.skip("strace is not installed, or may not trace here")
    found = attempts(federation.trace)
    assert sum(found.values()) > 100
    return found


def test_nothing_but_ours_is_reached(federation: Besieged, seen: Counter[tuple[str, str]]) -> None:
    found, port = {address for call, address in seen if call != "bind"}, ports(federation)
    assert found <= ours(federation)
    assert {f"127.0.0.1 {port[name]}" for name in ("proxy", "superlink", *HONEST)} <= found
    assert {f'unix "{federation.site(name).socket}"' for name in HONEST} <= found


def test_everything_of_ours_listens_on_loopback(
    federation: Besieged, seen: Counter[tuple[str, str]]
) -> None:
    bound, port = {address for call, address in seen if call == "bind"}, ports(federation)
    wanted = {f"127.0.0.1 {port[name]}" for name in ("proxy", "superlink", *HONEST)}
    wanted |= {f'unix "{federation.site(name).socket}"' for name in HONEST}
    tried = {"::1 0", "127.0.0.1 0", "netlink"}  # does this machine know IPv6? which addresses?
    assert wanted <= bound <= wanted | tried | {f"127.0.0.1 {port[LIAR]}"}


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('192.0.2.1', 9), timeout=0.1)",
        "import socket; socket.getaddrinfo('telemetry.example.org', 443)",
        "import os, socket; os.fork() or socket.socket(type=2).sendto(b'x', ('192.0.2.1', 9))",
    ],
    ids=["a connection", "a name", "a datagram of a child"],
)
def test_an_attempt_would_show(program: str, tmp_path: Path) -> None:
    under = tracer(tmp_path / "trace")
    if not under:
        pytest.skip("strace is not installed, or may not trace here")
    subprocess.run([*under, sys.executable, "-c", program], check=False, capture_output=True)
    found = reached(tmp_path / "trace")
    if "getaddrinfo" in program and not _asks_a_server():
        pytest.skip("this machine asks no name server")
    assert any(not address.startswith(("unix", "netlink", "127.")) for address in found), found


def _asks_a_server() -> bool:
    """Does this machine's configuration name a name server outside itself?"""
    with Path("/etc/resolv.conf").open() as file:
        servers = re.findall(r"^nameserver\s+(\S+)", file.read(), re.MULTILINE)
    return any(not server.startswith("127.") and socket.gethostname() for server in servers)
