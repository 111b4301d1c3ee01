"""The trainer's process: it opens the keys, listens, and says in the audit when it came and went.

On a Unix socket the file's mode says who may ask: the owner, or a group where relay and trainer are
different users. On a loopback port, for containers, every request must bear a token that lies in a
file of the same mode. One trainer a SITEDIR: a second one is refused, since two could train twice.
"""

from __future__ import annotations

import grp
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

import uvicorn

from fedseg.chain import Chain
from fedseg.errors import DataError, FedsegError, StorageError, TrustError
from fedseg.security.identity import SiteIdentity
from fedseg.security.keys import is_encrypted, load_receiving_key, load_signing_key
from fedseg.shell import passphrase
from fedseg.sole import sole
from sites.audit import utc_now
from sites.chronicle import Chronicle
from sites.folder import SiteFolder
from sites.gate import Gate, Keys
from sites.keyring import own_identity
from sites.policy import load_policy, open_at
from sites.rights import SHARED_FOLDER, make_folder
from sites.service import Desk, make_service
from sites.socketpath import socket_address
from sites.worker import make_trainer

logger = logging.getLogger(__name__)

OWNER_ONLY, WITH_GROUP = 0o600, 0o660
WATCH_S = 2.0
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True)
class Place:
    """Where a trainer listens.

    Attributes:
        address: `unix:PATH` or `HOST:PORT` on loopback.
        group: the group that may ask too, or None for the owner alone.
    """

    address: str
    group: str | None = None


def run_trainer(folder: SiteFolder, place: Place, device: str = "cpu") -> NoReturn:
    """Serve until SIGTERM, and end this process.

    Raises:
        BusyError: a trainer runs in this folder already.
        DataError: this is no SITEDIR, or the place cannot be listened on.
        TrustError: a key is missing, damaged or readable by others, or the passphrase is wrong.
    """
    own = own_identity(folder)
    keys = _keys(folder, own)
    make_folder(folder.run, SHARED_FOLDER)
    with sole(folder.trainer / "lock", "a trainer runs in this folder"):
        chronicle = Chronicle(Chain(folder.audit, keys.signing, utc_now))
        for name in folder.joined:
            _empty(folder.spool(name))

        def open_gate(study: str) -> Gate:
            return Gate(
                folder,
                study,
                own,
                keys,
                chronicle=chronicle,
                now=_now,
                make_trainer=partial(make_trainer, device=device),
            )

        def refused(reason: str) -> None:
            chronicle.provoked("refused", code="stranger", reason=reason)

        desk = Desk(folder, open_gate, partial(closed_because, folder), refused)
        with opened_place(folder, place) as (listener, token):
            chronicle.write("started", site=own.name)
            desk.warm_up()
            _watch(folder, chronicle)
            _serve(make_server(folder, desk, token), listener)
        chronicle.close()
        chronicle.write("stopped", site=own.name)
    logging.shutdown()
    os._exit(0)  # a task that is open is lost and done again; torch must not hold the end up


def closed_because(folder: SiteFolder) -> str | None:
    """Why no task is to be taken just now, or None."""
    if folder.paused.exists():
        return "paused"
    try:
        policy = load_policy(folder.policy)
    except FedsegError as error:
        return str(error)
    if not open_at(policy, datetime.now()):
        return f"policy.yaml allows work from {policy.hours} only"
    return None


def make_server(folder: SiteFolder, desk: Desk, token: str | None) -> uvicorn.Server:
    """The web server of the service: bounded in time and in what it reads before it knows why."""
    config = uvicorn.Config(
        make_service(folder, desk, token),
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        lifespan="off",
        http="h11",
        ws="none",
        limit_concurrency=64,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=16 * 1024,
    )
    return uvicorn.Server(config)


def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    """Run until SIGTERM or SIGINT; uvicorn raises them again afterwards, which is not wanted."""
    for wanted in (signal.SIGTERM, signal.SIGINT):
        signal.signal(wanted, lambda *_: None)
    logger.info("the trainer listens")
    server.run(sockets=[listener])


def _keys(folder: SiteFolder, own: SiteIdentity) -> Keys:
    """The site's two keys; a passphrase is asked for once."""
    locked = is_encrypted(folder.signing_key) or is_encrypted(folder.receiving_key)
    secret = passphrase("Passphrase of this site's keys") if locked else None
    keys = Keys(
        load_signing_key(folder.signing_key, secret),
        load_receiving_key(folder.receiving_key, secret),
    )
    if (keys.signing.public.text, keys.receiving.public.text) != (own.signing, own.sealing):
        raise TrustError(
            f"the keys are not those that {folder.request.name} names: bring all of them back from "
            "the same backup"
        )
    return keys


@contextmanager
def opened_place(folder: SiteFolder, place: Place) -> Iterator[tuple[socket.socket, str | None]]:
    """The bound socket, and the token where it is a port."""
    group = _group(place.group)
    kind, _, where = place.address.partition(":")
    if kind != "unix":
        with _port(place.address) as listener:
            yield listener, _token(folder.token, group)
        return
    path = Path(where)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            if (
                path.is_socket()
            ):  # of a trainer that was killed; any other file is not ours to remove
                path.unlink()
            before = os.umask(0o177)
            try:
                with socket_address(path) as address:
                    listener.bind(address)
            finally:
                os.umask(before)
            _share(path, group)
        except OSError as error:
            raise DataError(f"cannot listen on {path.name}: {error.strerror}") from None
        yield listener, None
        with suppress(OSError):
            path.unlink()


def _port(address: str) -> socket.socket:
    """A bound loopback port."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if host not in LOOPBACK or not port.isdigit():
        raise DataError(
            f"the trainer listens on loopback alone, such as 127.0.0.1:7070, not on {address}"
        )
    try:
        return socket.create_server(
            (host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        raise DataError(f"cannot listen on {address}: {error}") from None


def _token(path: Path, group: int | None) -> str:
    """A new token in its file."""
    token = secrets.token_urlsafe(32)
    draft = path.with_name(path.name + ".part")
    try:
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token + "\n")
        _share(draft, group, 0o640)
        draft.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path.name}: {error.strerror}") from error
    return token


def _share(path: Path, group: int | None, mode: int = WITH_GROUP) -> None:
    """Let a group in, where there is one."""
    if group is not None:
        os.chown(path, -1, group)
        path.chmod(mode)


def _group(name: str | None) -> int | None:
    """The number of a group."""
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise DataError(f"there is no group {name!r} on this machine") from None


def _watch(folder: SiteFolder, chronicle: Chronicle) -> None:
    """Note in the audit when the site is paused and resumed, from now on."""

    def watch() -> None:
        paused = folder.paused.exists()
        while True:
            time.sleep(WATCH_S)
            if folder.paused.exists() != paused:
                paused = not paused
                with suppress(FedsegError):
                    chronicle.write("paused" if paused else "resumed")

    threading.Thread(target=watch, daemon=True, name="fedseg-watch").start()


def _empty(spool: Path) -> None:
    """Remove what a trainer that was killed left in its spool."""
    for path in spool.glob("*"):
        with suppress(OSError):
            path.unlink()


def _now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)
