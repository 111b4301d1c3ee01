"""`fedseg-coordinator dashboard`: serve a study's page."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.commands.study import StudyPath
from fedseg.errors import DataError

if TYPE_CHECKING:
    from coordinator.folder import StudyFolder

EPILOG = """
Examples:

  fedseg-coordinator dashboard --study lab

  fedseg-coordinator dashboard --study lab --host 0.0.0.0 --port 8443
"""


def dashboard(
    study: StudyPath = Path(),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    token: Annotated[
        bool, typer.Option("--token", help="Ask for the token on this machine's own address too.")
    ] = False,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="No TLS on other addresses: a proxy of yours brings it."),
    ] = False,
) -> None:
    """Show a study in the browser: rounds, curves, hospitals, failures. It changes nothing.

    By default only this machine reaches the page. On any other address it asks for the token in
    run/dashboard.token and is served over TLS with the study's own certificate.
    """
    from coordinator.folder import open_study

    folder = open_study(study)
    with listen(host, port) as listener:
        serve(folder, listener, ask=token, plain=plain)


def serve(folder: StudyFolder, listener: socket.socket, *, ask: bool, plain: bool) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import uvicorn

    from coordinator.dashboard.guard import dashboard_token
    from coordinator.dashboard.reading import Reader
    from coordinator.dashboard.server import make_dashboard

    address, port = listener.getsockname()[:2]
    local = ip_address(address).is_loopback
    token_file = folder.run / "dashboard.token"
    token = dashboard_token(token_file) if ask or not local else None
    certificate, key = (None, None) if local or plain else _tls(folder)
    app = make_dashboard(Reader(folder), folder.plan(), token=token, local=local, secure=bool(key))
    shown = f"[{address}]" if ":" in address else address
    typer.echo(f"Study {folder.settings().study}: http{'s' if key else ''}://{shown}:{port}/")
    if token:
        typer.echo(f"The page asks for the token in {token_file}")
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=128,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=2,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Take an address; what it is decides whether a token is needed, not how it was written.

    Raises:
        DataError: it is none of this machine's, or is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=64)
    except OSError as error:
        raise DataError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose others with --host "
            "and --port"
        ) from None


def _tls(folder: StudyFolder) -> tuple[Path, Path]:
    """The study's own certificate and key; whoever imports ca/ca.crt trusts it."""
    for path in (folder.server_certificate, folder.server_key):
        if not path.is_file():
            raise DataError(
                f"the page is not served openly to other machines, and {path.name} is missing: "
                "`fedseg-coordinator init` makes it, or give --plain behind a proxy with TLS"
            )
    return folder.server_certificate, folder.server_key
