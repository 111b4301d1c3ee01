"""Every socket of ours on which somebody may speak, under seeded malformed requests.

The trainer (Unix socket, and loopback port with a token), the proxy (the real nginx, with a server
behind it that notes what reaches it) and the page. After each run: the service still does its work,
nothing was trained, nothing but a status or a known word came back, and memory and open files are
as before. Flower's own sockets, and these with everything real behind them, are in
tests/attack/test_deployment.py.
"""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest
from fuzzing import little_memory, mutated, request
from small_hospitals import Hospital, hospital, phantoms
from small_proxies import Site
from small_studies import founded

from coordinator.running.proxy import ProxyError, find_nginx
from fedseg.chain import Chain
from fedseg.security.keys import SigningKey
from sites.audit import utc_now
from sites.chronicle import SINGLY, Chronicle
from sites.client import Door, ask
from sites.listening import Place, make_server, opened_place
from sites.service import Desk

SEED = 20260503
SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]
WORDS = {
    *(b"", b"Not Found", b"Method Not Allowed", b"Bad Request", b"Service Unavailable"),
    b"Invalid HTTP request received.",
}
Connect = Callable[[], socket.socket]


def talk(connect: Connect, data: bytes) -> bytes:
    """Say this and take what comes; whoever is not answered within a moment hangs up."""
    received = b""
    with suppress(OSError, ssl.SSLError), connect() as peer:
        peer.settimeout(0.4)
        peer.sendall(data)
        while chunk := peer.recv(65536):
            received += chunk
    return re.sub(rb"^HTTP/1\.1 100 .*?\r\n\r\n", b"", received, flags=re.DOTALL)


def talk_all(connect: Connect, inputs: list[bytes]) -> list[bytes]:
    """Eight at a time; what was said to each."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda data: talk(connect, data), inputs))


def parts(answer: bytes) -> tuple[int, bytes]:
    """Status and body of the first response; nginx knows HTTP/0.9, which has no status."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if answer.startswith(b"<html>"):
        return 404, answer
    match = re.match(rb"HTTP/1\.[01] (\d{3})", head)
    assert match, answer[:200]
    size = re.search(rb"\ncontent-length: (\d+)", head, re.IGNORECASE)
    if size:  # there may be a second response
        return int(match[1]), body[: int(size[1])]
    chunk = re.fullmatch(rb"[0-9a-f]+\r\n(.*)\r\n0\r\n\r\n", body, re.DOTALL)
    return int(match[1]), chunk[1] if chunk else body


def malformed(seed: str, count: int, paths: list[str], bodies: list[bytes]) -> list[bytes]:
    """Requests with something wrong; most ask that the connection be closed afterwards."""
    rng = Random(f"{SEED} {seed}")
    made = (request(rng, paths, bodies) for _ in range(count))
    return [data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) for data in made]


@contextmanager
def serving(site: Hospital, address: str) -> Iterator[tuple[Door, Connect, Chronicle]]:
    """The trainer's service, in a thread."""
    folder = site.folder
    chronicle = Chronicle(Chain(folder.audit, site.signing, utc_now))

    def refused(reason: str) -> None:
        chronicle.provoked("refused", code="stranger", reason=reason)

    gate = site.gate(chronicle)
    desk = Desk(folder, lambda _study: gate, lambda: None, refused)
    with opened_place(folder, Place(address)) as (listener, token):
        server = make_server(folder, desk, token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        where = listener.getsockname()
        at = address if token is None else f"127.0.0.1:{where[1]}"

        def connect() -> socket.socket:
            peer = socket.socket(listener.family)
            peer.settimeout(5)
            peer.connect(where)
            return peer

        yield Door(at, folder.token if token else None), connect, chronicle
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    place = tmp_path_factory.mktemp("s")
    return hospital(place / "s", phantoms(place / "phantoms"))


@pytest.mark.parametrize("count", [130, pytest.param(6_000, marks=SLOW)])
def test_the_trainers_socket(count: int, site: Hospital, caplog: pytest.LogCaptureFixture) -> None:
    good, train = site.task("enlist", 0), site.task("train", 1)
    bodies = [good, site.task(signer=SigningKey.generate()), train[:-1], b"", b"x" * 70_000]
    paths = ["/studies/tiny/tasks", "/studies/tiny/tasks", "/studies/other/tasks", "/status"]
    rng, size = Random(f"{SEED} bodies"), site.folder.audit.stat().st_size
    whole = [data for data in (mutated(rng, train, bodies) for _ in range(count)) if data != train]
    head = "POST /studies/tiny/tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}"
    inputs = [f"{head.format(len(data))}\r\n\r\n".encode() + data for data in whole[: count // 2]]
    inputs += malformed("trainer", count - len(inputs), paths, bodies)
    before = counted(site)
    with serving(site, f"unix:{site.folder.socket}") as (door, connect, chronicle):
        assert site.said(ask(door, "tiny", good)).body.kind == "enlist"
        with little_memory(96):
            said = [parts(answer) for answer in talk_all(connect, inputs) if answer]
        assert site.said(ask(door, "tiny", good)).body.kind == "enlist"
        chronicle.close()
    statuses = [status for status, _ in said]
    asked_again = {409, 429}  # the same bytes from eight at a time, and a hundred times an hour
    assert set(statuses) <= {200, 400, 403, 404, 405, 413, 431, 503} | asked_again
    for status, body in said:
        assert status == 200 or body in WORDS, body[:200]
        assert str(site.folder.path).encode() not in body and b"Traceback" not in body
    assert site.trained == 0 and not list(site.folder.spool("tiny").iterdir())
    refused = sum(status in {403, 413} for status in statuses)
    assert refused <= counted(site) - before  # a 404 may be of a path that is none
    assert site.folder.audit.stat().st_size - size < 1_000_000
    assert not [r for r in caplog.records if r.exc_info], "a traceback in the log"


def counted(site: Hospital) -> int:
    """Refusals that the audit knows of, one by one or as a number."""
    entries = [str(entry.facts["reason"]) for entry in site.audited("refused")]
    more = [re.match(r"(\d+) more within", reason) for reason in entries]
    singly = sum(match is None for match in more)
    assert singly <= 3 * SINGLY
    return singly + sum(int(match[1]) for match in more if match)


@pytest.mark.parametrize("count", [40, pytest.param(2_000, marks=SLOW)])
def test_the_trainers_port_with_a_token(count: int, site: Hospital) -> None:
    good = site.task("enlist", 0)
    inputs = malformed("port", count, ["/studies/tiny/tasks", "/status", "/health"], [good])
    with serving(site, "127.0.0.1:0") as (door, connect, _):
        with little_memory(96):
            said = {parts(answer)[0] for answer in talk_all(connect, inputs) if answer}
        assert said <= {400, 401, 431, 503}
        assert site.said(ask(door, "tiny", good)).body.kind == "enlist"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    try:
        find_nginx()
    except ProxyError as error:
        pytest.skip(str(error))
    made = Site(tmp_path_factory.mktemp("proxy") / "study")
    yield made
    made.close()


@pytest.mark.parametrize("count", [110, pytest.param(4_000, marks=SLOW)])
def test_the_proxy(count: int, proxy: Site) -> None:
    paths = ["/v1/fleet/get-run", "/v1/fleet/push-object", "/v1/control/start-run", "/v1/runtime/x"]
    bodies = [b"", b"\x0a\x03abc", b"x" * 9_000, b"POST /v1/control/start-run HTTP/1.1\r\n\r\n"]
    inputs = malformed("proxy", count, paths, bodies)
    rng = Random(f"{SEED} tls")
    no_tls = [rng.randbytes(rng.choice((1, 5, 300))) for _ in range(count // 10)] + inputs[:5]
    trust = proxy.trust()

    def plain() -> socket.socket:
        return socket.create_connection(("127.0.0.1", proxy.settings.port), timeout=5)

    def secure() -> socket.socket:
        return trust.wrap_socket(plain(), server_hostname="localhost")

    proxy.backend.seen.clear()
    pid = proxy.supervisor.states()["proxy"].pid
    with little_memory(48, pid):
        said = [parts(answer) for answer in talk_all(secure, inputs) if answer]
        talk_all(plain, no_tls)
        time.sleep(0.5)
    assert {status for status, _ in said} <= {200, 400, 404, 405, 408, 411, 413, 414, 501, 505, 502}
    assert all(
        b"1.22" not in body and str(proxy.folder.path).encode() not in body for _, body in said
    )
    strange = {(m, p) for m, p, _, _ in proxy.backend.seen if m != "POST"}
    strange |= {
        (m, p) for m, p, _, _ in proxy.backend.seen if not re.fullmatch("/v1/fleet/[a-z-]+", p)
    }
    assert not strange, strange
    assert proxy.ask("/v1/fleet/get-run")[0] == 200
    assert proxy.supervisor.states()["proxy"].pid == pid
    assert proxy.folder.log("proxy").stat().st_size < 5_000 * (count + 50)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int, Path, str]]:
    """A dashboard as its command starts it, asking for a token: port, process, log, folder."""
    folder, _ = founded(tmp_path_factory.mktemp("page") / "study")
    log = folder.path.parent / "page.log"
    command = str(Path(sys.executable).with_name("fedseg-coordinator"))
    arguments = ["dashboard", "--study", str(folder.path), "--port", "0", "--token"]
    with log.open("wb") as out:
        process = subprocess.Popen([command, *arguments], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"127\.0\.0\.1:(\d+)/", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield int(found[1]), process.pid, log, str(folder.path)
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("count", [100, pytest.param(3_000, marks=SLOW)])
def test_the_page(count: int, page: tuple[int, int, Path, str]) -> None:
    port, pid, log, folder = page
    paths = ["/", "/login", "/progress.json", "/style.css", "/live.js", "/docs", "/openapi.json"]
    inputs = malformed(
        "page", count, paths, [b"", b"token=abc", b"token=" + b"x" * 5_000, b"%ff&=&"]
    )

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=5)

    def look() -> bytes:
        return talk(connect, b"GET /login HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")

    until = time.monotonic() + 20
    while not look().startswith(b"HTTP/1.1 200") and time.monotonic() < until:
        time.sleep(0.1)
    with little_memory(64, pid):
        said = [parts(answer) for answer in talk_all(connect, inputs) if answer]
    assert {status for status, _ in said} <= {
        200,
        303,
        304,
        307,
        400,
        401,
        403,
        404,
        405,
        421,
        431,
        503,
    }
    for _, body in said:
        assert b"Traceback" not in body and folder.encode() not in body and b"tiny" not in body
    assert look().startswith(b"HTTP/1.1 200")
    assert "Traceback" not in log.read_text()
