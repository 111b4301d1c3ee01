"""The relay: Flower's SuperNode of one study, with nothing around it that it does not need.

What it is given: the coordinator's address and CA, Flower's node key, a FLWR_HOME of its own, and
where the trainer listens. What it is not given: this process's environment (proxy settings may
pass), a data folder, a key of the site. Code from outside may run in it: all that such code finds
is sealed bytes and a socket that answers only what the study key signed.

Flower ends a SuperNode that may not connect with status 1, whatever the reason: the reason is in
its log, and `what_it_says` reads it there. A key that is not enrolled and a session that Flower
still holds, up to 60 s after a kill, are refused in the same words.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedseg.errors import DataError
from fedseg.quiet import QUIET
from sites.folder import Link, SiteFolder

PASSES = (
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "ALL_PROXY",
    "all_proxy",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
)
NO_PROXY = ("NO_PROXY", "no_proxy")
OURSELVES = "127.0.0.1,localhost,::1"
POLLS = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"

Word = Literal["starting", "on line", "unreachable", "refused", "certificate"]
BEGINS = "Starting Flower SuperNode"
# Flower's words; its SuperExec, which tries to reach a SuperNode that ended, uses the same ones.
_FINAL: tuple[tuple[str, Word], ...] = (
    ("CERTIFICATE_VERIFY_FAILED", "certificate"),
    ("Failed to initialize the connection", "refused"),
)
_PASSING: tuple[tuple[str, Word], ...] = (
    ("SuperNode ID: ", "on line"),
    ("Connection successful after", "on line"),
    ("Connection attempt failed, retrying", "unreachable"),
    ("SSL/TLS handshake error", "unreachable"),
)


@dataclass(frozen=True)
class Relay:
    """How the relay of one study is started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def relay_of(folder: SiteFolder, study: str, outside: Mapping[str, str] = os.environ) -> Relay:
    """The relay of a study that was joined.

    Args:
        outside: the environment that proxy settings are taken from.

    Raises:
        DataError: the study has no link, or a path cannot be passed on.
    """
    link = folder.link_of(study)
    command = (
        *(sys.executable, "-P", "-m", "sites.supernode"),
        *("--superlink", link.address),
        *("--root-certificates", str(folder.ca(study))),
        *("--auth-supernode-private-key", str(folder.node_key)),
        *("--host", "127.0.0.1"),
        *("--port", str(link.port)),
        *("--node-config", _node_config(folder, link)),
    )
    return Relay(command, _environment(folder, study, outside))


def what_it_says(log: str) -> Word:
    """How a relay does, by what Flower wrote since it was last started."""
    life = log.rpartition(BEGINS)[2]
    for sign, word in _FINAL:
        if sign in life:
            return word
    _, newest = max((life.rfind(sign), word) for sign, word in _PASSING)
    return newest if any(sign in life for sign, _ in _PASSING) else "starting"


def _node_config(folder: SiteFolder, link: Link) -> str:
    """What the ClientApp finds in its context."""
    said = {"study": link.study, "trainer": link.trainer}
    if not link.trainer.startswith("unix:"):
        said["token-file"] = str(folder.token)
    if any(set('"\\\n') & set(value) for value in said.values()):
        raise DataError("the site folder's path has a quote, a backslash or a line end: move it")
    return " ".join(f'{name}="{value}"' for name, value in said.items())


def _environment(folder: SiteFolder, study: str, outside: Mapping[str, str]) -> dict[str, str]:
    """All that the relay's processes see; Flower finds its own programs by PATH."""
    passed = {name: outside[name] for name in PASSES if outside.get(name)}
    spared = ",".join(filter(None, (OURSELVES, *(outside.get(name) for name in NO_PROXY[:1]))))
    home = str(folder.flower(study))
    return {
        **passed,
        **dict.fromkeys(NO_PROXY, spared),
        **QUIET,
        **POLLS,
        "FLWR_HOME": home,
        "HOME": home,
        "PATH": f"{sysconfig.get_path('scripts')}:{SYSTEM_PATH}",
        "PYTHONUNBUFFERED": "1",
        "PYTHONNOUSERSITE": "1",
    }
