"""The relay gets what it needs and nothing else, and Flower's log says how it does."""

from __future__ import annotations

import socket
import subprocess
import tomllib
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread

import pytest

from fedseg.errors import DataError
from fedseg.security.certificates import make_ca
from fedseg.security.nodekeys import make_node_key
from sites.folder import Link, SiteFolder
from sites.notes import write_note
from sites.relay import BEGINS, OURSELVES, relay_of, what_it_says

OUTSIDE = {
    "HTTPS_PROXY": "http://proxy.hospital:3128",
    "NO_PROXY": "intranet",
    "FEDSEG_PASSPHRASE_FILE": "/secret",
    "FEDSEG_SITE": "/site",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "PYTHONPATH": "/elsewhere",
    "LD_PRELOAD": "/elsewhere.so",
    "PATH": "/elsewhere",
    "FLWR_HOME": "/elsewhere",
    "FLWR_TELEMETRY_ENABLED": "1",
    "SSL_CERT_FILE": "/elsewhere.pem",
    "LANG": "de_DE.UTF-8",
}
STARTS = f"INFO : {BEGINS}\nINFO: Uvicorn running on http://127.0.0.1:20000\n"
ONLINE = "INFO : SuperNode ID: 7249497438809009256\nINFO : Starting Flower SuperExec\n"
RETRIES = "WARNING : Connection attempt failed, retrying in 0.55 seconds\n"
REFUSED = (
    "ERROR : Exit Code: 305\nFailed to initialize the connection to the SuperLink.\n"
    "[code: 2004] Failed to activate SuperNode.\n"
)
CERTIFICATE = (
    "ERROR : SSL/TLS handshake error detected.\nERROR : Exit Code: 305\n"
    "Failed to initialize the connection to the SuperLink.\n"
    "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get issuer\n"
)


def site(path: Path, trainer: str = "unix:run/trainer.sock") -> SiteFolder:
    folder = SiteFolder(path / "site")
    folder.relay_of("lung").mkdir(parents=True)
    link = Link(study="lung", address="fl.example.org:443", trainer=trainer, port=20017)
    write_note(folder.link("lung"), link)
    return folder


def option(command: tuple[str, ...], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_relays_environment_is_made_and_not_inherited(tmp_path: Path) -> None:
    folder = site(tmp_path)
    found = relay_of(folder, "lung", OUTSIDE).environment
    assert found["HTTPS_PROXY"] == OUTSIDE["HTTPS_PROXY"]
    assert found["NO_PROXY"] == found["no_proxy"] == f"{OURSELVES},intranet"
    assert found["FLWR_HOME"] == found["HOME"] == str(folder.flower("lung"))
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found["LANG"] == OUTSIDE["LANG"]
    kept = {name for name in OUTSIDE if found.get(name) == OUTSIDE[name]}
    assert kept == {"HTTPS_PROXY", "LANG"}


def test_the_relay_is_told_its_own_study_and_keys_of_flowers_alone(tmp_path: Path) -> None:
    folder = site(tmp_path)
    command = relay_of(folder, "lung", OUTSIDE).command
    assert command[1:4] == ("-P", "-m", "sites.supernode")
    assert option(command, "--superlink") == "fl.example.org:443"
    assert option(command, "--root-certificates") == str(folder.ca("lung"))
    assert option(command, "--auth-supernode-private-key") == str(folder.node_key)
    assert (option(command, "--host"), option(command, "--port")) == ("127.0.0.1", "20017")
    assert "--insecure" not in command
    assert not any(str(folder.trainer) in word for word in command)
    said = tomllib.loads("\n".join(option(command, "--node-config").split(" ")))
    assert said == {"study": "lung", "trainer": f"unix:{folder.socket}"}


def test_a_trainer_on_a_port_comes_with_the_place_of_its_token(tmp_path: Path) -> None:
    folder = site(tmp_path, "127.0.0.1:7070")
    command = relay_of(folder, "lung", {}).command
    assert f'token-file="{folder.token}"' in option(command, "--node-config")


def test_a_path_that_flower_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="quote"):
        relay_of(site(tmp_path / 'a"b'), "lung", {})
    with pytest.raises(DataError, match=r"link\.json"):
        relay_of(site(tmp_path), "other", {})


@pytest.mark.parametrize(
    ("log", "word"),
    [
        ("", "starting"),
        (STARTS, "starting"),
        (STARTS + RETRIES, "unreachable"),
        (STARTS + RETRIES + ONLINE, "on line"),
        (STARTS + ONLINE + RETRIES, "unreachable"),
        (STARTS + ONLINE + RETRIES + "INFO : Connection successful after 9.1 s", "on line"),
        (STARTS + REFUSED, "refused"),
        (STARTS + REFUSED + RETRIES, "refused"),  # its SuperExec looks for it still
        (STARTS + CERTIFICATE + RETRIES, "certificate"),
        (STARTS + ONLINE + f"fedseg: {BEGINS}\n", "starting"),
        (STARTS + REFUSED + STARTS + ONLINE, "on line"),
    ],
)
def test_flowers_log_says_how_a_relay_does(log: str, word: str) -> None:
    assert what_it_says(log) == word


def test_a_relay_that_gave_up_ends_instead_of_lingering(tmp_path: Path) -> None:
    folder = site(tmp_path)
    make_node_key(folder.node_key)
    pair = make_ca("elsewhere", datetime.now(UTC))
    folder.ca("lung").write_bytes(pair.certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        link = folder.link_of("lung").model_copy(
            update={"address": f"127.0.0.1:{listener.getsockname()[1]}", "port": free_port()}
        )
        write_note(folder.link("lung"), link)
        Thread(target=hang_up, args=(listener,), daemon=True).start()
        relay = relay_of(folder, "lung")
        folder.flower("lung").mkdir(parents=True)
        with (tmp_path / "log").open("wb") as log:  # its SuperExec would hold a pipe open
            done = subprocess.run(
                relay.command,
                env=dict(relay.environment),
                stdout=log,
                stderr=log,
                timeout=100,
                check=False,
            )
    assert b"handshake error" in (tmp_path / "log").read_bytes()
    assert done.returncode != 0


def hang_up(listener: socket.socket) -> None:
    """Take every connection and close it, as a middle box does."""
    with suppress(OSError):
        while True:
            listener.accept()[0].close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
