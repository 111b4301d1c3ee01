"""A study folder with certificates, the real nginx, and behind it a server that notes requests."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from coordinator.folder import Settings, StudyFolder
from coordinator.running.proxy import find_nginx, proxy_command, proxy_environment, write_proxy
from fedseg.durable import write_atomically
from fedseg.security.certificates import make_ca, make_server_certificate
from fedseg.supervision import Program, Supervisor


class Backend(ThreadingHTTPServer):
    """Stands where the SuperLink would, and notes every request that reaches it."""

    daemon_threads = True

    def __init__(self, certificate: Path, key: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.seen: list[tuple[str, str, dict[str, str], int]] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A connection that nginx refused; what counts is what was seen."""


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        self.server.seen.append((self.command, self.path, dict(self.headers), len(body)))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    do_GET = do_PUT = do_DELETE = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Quiet."""


class Site:
    """A study folder with certificates, a backend and the real nginx between."""

    def __init__(self, path: Path, *, backend_ca: tuple[bytes, bytes] | None = None) -> None:
        now = datetime.now(UTC)
        self.folder = StudyFolder(path)
        path.mkdir()
        self.folder.run.mkdir()
        self.ca = make_ca("study", now)
        server = make_server_certificate(*self.ca, ("localhost", "127.0.0.1"), now)
        write_atomically(self.folder.ca_certificate, self.ca[1])
        write_atomically(self.folder.server_key, server[0], 0o600)
        write_atomically(self.folder.server_certificate, server[1])
        other = make_server_certificate(*(backend_ca or self.ca), ("localhost",), now)
        write_atomically(path / "backend.key", other[0], 0o600)
        write_atomically(path / "backend.crt", other[1])
        self.backend = Backend(path / "backend.crt", path / "backend.key")
        self.settings = settings(free_port(), self.backend.server_address[1])
        nginx = find_nginx()
        write_proxy(self.folder, self.settings, nginx)
        program = Program(
            "proxy",
            proxy_command(self.folder, nginx),
            proxy_environment(),
            self.folder.log("proxy"),
            ready=lambda: listens(self.settings.port),
        )
        self.supervisor = Supervisor([program], observe=lambda _: None)
        self.until_ready()

    def until_ready(self) -> None:
        deadline = time.monotonic() + 10
        while not self.supervisor.states()["proxy"].ready:
            assert time.monotonic() < deadline, self.folder.log("proxy").read_text()
            self.supervisor.step()
            time.sleep(0.01)

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.ca[1].decode())

    def ask(
        self,
        path: str,
        method: str = "POST",
        body: bytes = b"",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPSConnection(
            "localhost", self.settings.port, timeout=10, context=self.trust()
        )
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def raw(self, data: bytes) -> bytes:
        """Bytes as they are, for what no honest client sends."""
        with (
            socket.create_connection(("127.0.0.1", self.settings.port), timeout=10) as plain,
            self.trust().wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            secure.sendall(data)
            received = b""
            while chunk := secure.recv(65536):
                received += chunk
            return received

    def close(self) -> None:
        self.supervisor.stop_all()
        self.backend.shutdown()
        self.backend.server_close()


def settings(port: int, superlink: int, **changes: object) -> Settings:
    given = {"study": "tiny", "host": "localhost", "listen": "127.0.0.1", "created": "2026-01-01"}
    return Settings.model_validate({**given, "port": port, "superlink_port": superlink, **changes})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0
