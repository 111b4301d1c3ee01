"""The proxy's rules, seen through the real nginx in front of a server that records what it gets."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from small_proxies import Site, free_port, settings

from coordinator.folder import StudyFolder
from coordinator.running.proxy import ProxyError, configuration, find_nginx, write_proxy
from fedseg.security.certificates import make_ca

FLEET = [
    "register-node", "activate-node", "deactivate-node", "unregister-node", "send-node-heartbeat",
    "pull-messages", "push-messages", "get-run", "get-fab", "push-object", "pull-object",
    "confirm-message-received",
]  # fmt: skip
HOSTILE = [
    "/", "/health", "/openapi.json", "/docs", "/v1/control/start-run", "/v1/control/register-node",
    "/v1/runtime/acquire-task", "/v1/runtime/pull-task-input", "/v1/responses",
    "/v1/fleet", "/v1/fleet/", "/v1/fleet/../control/start-run", "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/..%5ccontrol/start-run",
    "/v1/fleet/%2e%2e%2fcontrol%2fstart-run", "/v1/fleet/.%2e/control/start-run",
    "/v1/fleet//get-run", "//v1/fleet/get-run", "/v1//control/start-run", "/v1/fleet/./get-run",
    "/v1/control/../fleet/get-run", "/v1/fleet%2fget-run", "/v1%2ffleet/get-run",
    "/v1/fleet/get-run/", "/v1/fleet/get-run/../../control/start-run", "/v1/fleet/get-run?x=1",
    "/v1/fleet/get-run#/v1/control/start-run", "/v1/fleet/get-run;/../../control/start-run",
    "/v1/fleet/get-run%00", "/v1/fleet/get-run%0d%0aX:%201", "/V1/FLEET/get-run",
    "/v1/fleet/Get-Run", "/v1/fleet/get%2drun", "/v1/fleet/\xff", "/v1/fleet/-", "/v1/fleet/..",
    "http://localhost/v1/control/start-run", "*", "%2fv1",
]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("with a space") / "stüdy")
    yield made
    made.close()


@pytest.mark.parametrize("name", FLEET)
def test_every_call_of_a_supernode_passes_unchanged(site, name):
    site.backend.seen.clear()
    signed = {"flwr-public-key": "a2V5", "flwr-signature": "c2ln", "flwr-timestamp": "2026"}
    status, _, body = site.ask(f"/v1/fleet/{name}", body=b"12345", headers=signed)
    ((method, path, headers, size),) = site.backend.seen
    assert (status, body, method, path, size) == (200, b"ok", "POST", f"/v1/fleet/{name}", 5)
    assert signed.items() <= {key.lower(): value for key, value in headers.items()}.items()


def test_flowers_own_routes_are_the_ones_that_pass():
    from flwr.superlink.routers.fleet.router import router

    assert sorted(route.path for route in router.routes) == sorted(f"/v1/fleet/{n}" for n in FLEET)


@pytest.mark.parametrize("path", HOSTILE)
def test_nothing_else_reaches_flower(site, path):
    site.backend.seen.clear()
    for method in ("POST", "GET"):
        line = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        answer = site.raw(line.encode("latin-1") + b"Content-Length: 0\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")) or not answer, answer[:80]
    assert site.backend.seen == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "post"])
def test_only_post_passes(site, method):
    site.backend.seen.clear()
    line = f"{method} /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    status = site.raw(line.encode()).split(b" ")[1]
    assert status in {b"404", b"405", b"400"} and site.backend.seen == []


def test_a_second_request_hidden_in_the_first_does_not_pass(site):
    site.backend.seen.clear()
    hidden = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    both = b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n0\r\n\r\n" % (len(hidden) + 5)
    first = b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\n"
    site.raw(first + both + hidden.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert {path for _, path, _, _ in site.backend.seen} <= {"/v1/fleet/get-run"}


def test_oversized_bodies_are_refused_unread(site):
    site.backend.seen.clear()
    line = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    assert b" 413 " in site.raw(line + b"Content-Length: 99999999999\r\n\r\n")[:20]
    chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
    try:
        said = site.raw(line + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 20)
    except (ConnectionError, ssl.SSLError):
        said = b""  # closed in the face of who goes on sending
    assert not said or b" 413 " in said[:20]
    assert b" 400 " in site.raw(line + b"X: " + b"y" * 40_000 + b"\r\n\r\n")[:20]
    assert site.backend.seen == []


def test_five_megabytes_pass_and_leave_nothing_on_disk(site):
    site.backend.seen.clear()
    status, _, _ = site.ask("/v1/fleet/push-object", body=bytes(5 * 1024**2 + 4096))
    assert status == 200 and site.backend.seen[0][3] == 5 * 1024**2 + 4096
    assert [p for p in (site.folder.proxy / "body").rglob("*") if p.is_file()] == []


def test_what_was_refused_is_logged_without_its_body(site):
    site.ask("/v1/control/start-run", body=b"secret-body")
    site.ask("/v1/fleet/get-run", body=b"secret-body")
    log = site.folder.log("proxy").read_text()
    assert '127.0.0.1 "POST /v1/control/start-run HTTP/1.1" 404' in log
    assert "secret-body" not in log and '/v1/fleet/get-run HTTP/1.1" 200' not in log


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_neither_version_nor_old_tls_is_offered(site):
    _, headers, body = site.ask("/")
    assert headers["Server"] == "nginx" and b"1." not in body
    old = site.trust()
    old.set_ciphers("ALL:@SECLEVEL=0")  # this side would do it
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        pytest.raises((ssl.SSLError, OSError)),
        socket.create_connection(("127.0.0.1", site.settings.port)) as plain,
    ):
        old.wrap_socket(plain, server_hostname="localhost")


def test_it_is_one_process_of_ours_without_root_files_elsewhere(site):
    pid = site.supervisor.states()["proxy"].pid
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""
    assert Path(f"/proc/{pid}").stat().st_uid == os.getuid()
    assert stat.S_IMODE(site.folder.proxy.stat().st_mode) == 0o700


def test_a_killed_proxy_comes_back_on_the_same_port(site):
    before = site.supervisor.states()["proxy"].pid
    os.kill(before, 9)
    while site.supervisor.states()["proxy"].restarts == 0:
        site.supervisor.step()
        time.sleep(0.01)
    site.until_ready()
    assert site.ask("/v1/fleet/get-run")[0] == 200


def test_a_superlink_with_another_cas_certificate_gets_no_request(tmp_path):
    site = Site(tmp_path / "study", backend_ca=make_ca("study", datetime.now(UTC)))
    try:
        assert site.ask("/v1/fleet/get-run")[0] == 502
        assert site.backend.seen == []
    finally:
        site.close()


def test_no_path_of_the_machine_is_in_the_configuration(tmp_path):
    text = configuration(settings(8443, 8000, listen="::"))
    assert "listen [::]:8443 ssl;" in text and "server 127.0.0.1:8000;" in text
    assert str(tmp_path) not in text and " /" not in text.replace("/v1/fleet/", "").replace(
        "location / {", ""
    )


def test_a_missing_nginx_is_said_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ProxyError, match="apt install nginx-light"):
        find_nginx()


def test_what_nginx_does_not_take_is_said(tmp_path):
    folder = StudyFolder(tmp_path / "study")
    folder.path.mkdir()
    with pytest.raises(ProxyError, match=r"does not take its configuration: .*server\.crt"):
        write_proxy(folder, settings(free_port(), 8000), find_nginx())
