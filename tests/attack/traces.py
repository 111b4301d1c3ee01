"""What a tracer wrote of a federation: whom its processes tried to reach, and where they listen."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from besieged import HONEST, LIAR, STUDY, Besieged

ON_THIS_MACHINE = {"/var/run/nscd/socket", "/run/nscd/socket", "/dev/log"}


def attempts(trace: Path) -> Counter[tuple[str, str]]:
    """Call and address of everything that a tracer saw; those without an address go nowhere new."""
    found: Counter[tuple[str, str]] = Counter()
    for file in trace.iterdir():
        for line in file.read_text(errors="replace").splitlines():
            call = line.partition("(")[0]
            for family, rest in re.findall(r"sa_family=AF_(\w+)(.*?)}", line):
                found[call, _address(family, rest)] += 1
    return found


def _address(family: str, rest: str) -> str:
    """An address as strace writes it, shorter."""
    port = re.search(r"port=htons\((\d+)\)", rest)
    host = re.search(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"', rest)
    if family in {"INET", "INET6"} and port and host:
        return f"{host[1] or host[2]} {port[1]}"
    path = re.search(r'sun_path=(@?"[^"]*")', rest)
    return f"unix {path[1]}" if path else family.lower()


def ports(federation: Besieged) -> dict[str, int]:
    """What of ours listens where."""
    settings = federation.deployment.coordinator.settings()
    relays = {name: federation.site(name).link_of(STUDY).port for name in (*HONEST, LIAR)}
    return {"proxy": settings.port, "superlink": settings.superlink_port, **relays}


def ours(federation: Besieged) -> set[str]:
    """Every address that a process of ours may reach."""
    loopback = {f"{host} {n}" for n in ports(federation).values() for host in ("127.0.0.1", "::1")}
    sockets = {f'unix "{federation.site(name).socket}"' for name in HONEST}
    machine = {f'unix "{path}"' for path in ON_THIS_MACHINE} | {"netlink", "unspec"}
    return loopback | sockets | machine


def reached(trace: Path) -> set[str]:
    """Every address that somebody tried to reach, whether it worked or not."""
    return {address for call, address in attempts(trace) if call != "bind"}
