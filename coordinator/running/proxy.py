"""The one door to the internet: nginx in front of the SuperLink, and only what a site needs passes.

Whoever reaches Flower's Control or Runtime API may run code on the coordinator and at every site,
without a login. The proxy therefore passes a request only if its first line, as it came and before
anything is decoded, is `POST /v1/fleet/` and one plain word. Everything else meets a 404 and never
reaches Flower. Towards the SuperLink the connection is TLS too, checked against the study's own CA.

nginx runs as one process without root and writes into its own folder alone; its configuration names
no absolute path, so a study's folder can be moved.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from coordinator.folder import Settings, StudyFolder
from fedseg.durable import write_atomically
from fedseg.errors import FedsegError
from fedseg.supervision import complete

PREFIX = "/v1/fleet/"
LARGEST_BODY = "16m"  # Flower sends 5 MiB a request
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/usr/local/nginx/sbin", "/opt/homebrew/bin")
_TEST_S = 20.0

_CONFIG = """\
# Written by fedseg-coordinator at every start; what is changed here is lost.
daemon off;
master_process off;  # fedseg supervises the one process; a master's workers would outlive its kill
pid nginx.pid;
error_log stderr warn;
events { worker_connections 1024; }

http {
    server_tokens off;
    access_log off;
    log_format refused '$time_iso8601 $remote_addr "$request" $status';
    client_body_temp_path body;
    proxy_temp_path upstream;
    fastcgi_temp_path none;
    uwsgi_temp_path none;
    scgi_temp_path none;

    client_max_body_size LARGEST_BODY;
    client_body_buffer_size 6m;
    client_header_buffer_size 4k;
    large_client_header_buffers 4 8k;
    client_header_timeout 20s;
    client_body_timeout 60s;
    send_timeout 60s;
    keepalive_timeout 75s;
    reset_timedout_connection on;
    limit_conn_zone $binary_remote_addr zone=peers:1m;

    map "$request_method $request_uri" $for_a_site {
        default 0;
        "~^POST PREFIX[a-z]+(-[a-z]+)*$" 1;
    }
    map $status $refused { default 0; ~^4 1; }

    upstream superlink {
        server 127.0.0.1:SUPERLINK_PORT;
        keepalive 16;
    }

    server {
        listen LISTEN ssl;
        access_log ../logs/proxy.log refused if=$refused;
        limit_conn peers 64;

        ssl_certificate ../tls/server.crt;
        ssl_certificate_key ../tls/server.key;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
        ssl_prefer_server_ciphers on;
        ssl_session_tickets off;
        ssl_session_cache shared:sites:1m;

        if ($for_a_site = 0) { return 404; }
        location / { return 404; }
        location PREFIX {
            proxy_pass https://superlink;
            proxy_http_version 1.1;
            proxy_set_header Host localhost;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_ssl_verify on;
            proxy_ssl_verify_depth 1;
            proxy_ssl_trusted_certificate ../ca/ca.crt;
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            proxy_connect_timeout 5s;
            proxy_read_timeout 120s;
            proxy_send_timeout 60s;
            proxy_next_upstream off;
            proxy_max_temp_file_size 0;
            proxy_intercept_errors off;
        }
    }
}
"""


class ProxyError(FedsegError):
    """nginx is missing or does not take the configuration: whoever runs the machine must act."""


def find_nginx() -> Path:
    """Where nginx is installed.

    Raises:
        ProxyError: nowhere; the message says how to install it.
    """
    path = os.pathsep.join((os.environ.get("PATH", ""), *_PLACES))
    found = shutil.which("nginx", path=path)
    if found is None:
        raise ProxyError(
            "sites reach the coordinator through nginx, which is not installed. Debian, Ubuntu: "
            "apt install nginx-light; Red Hat, Fedora: dnf install nginx; then stop the service "
            "that came with it (systemctl disable --now nginx), fedseg starts one of its own"
        )
    return Path(found)


def configuration(settings: Settings) -> str:
    """The configuration of a study's proxy; all paths are relative to its folder."""
    address = f"[{settings.listen}]" if ":" in settings.listen else settings.listen
    return (
        _CONFIG.replace("LARGEST_BODY", LARGEST_BODY)
        .replace("PREFIX", PREFIX)
        .replace("SUPERLINK_PORT", str(settings.superlink_port))
        .replace("LISTEN", f"{address}:{settings.port}")
    )


def proxy_command(folder: StudyFolder, nginx: Path) -> tuple[str, ...]:
    """Run nginx in the foreground; all paths are relative to its own folder."""
    return (str(nginx), "-p", f"{folder.proxy}/", "-c", "nginx.conf", "-e", "stderr")


def proxy_environment() -> dict[str, str]:
    """All that nginx needs."""
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def write_proxy(folder: StudyFolder, settings: Settings, nginx: Path) -> None:
    """Write the configuration and have nginx itself check it.

    Raises:
        ProxyError: nginx refuses it, or may not bind the port; with what it said.
        StorageError: the folder cannot be written.
    """
    folder.proxy.mkdir(mode=0o700, exist_ok=True)
    folder.logs.mkdir(mode=0o700, exist_ok=True)
    write_atomically(folder.proxy_config, configuration(settings).encode())
    command = (*proxy_command(folder, nginx), "-t")
    status, said = complete(command, proxy_environment(), timeout_s=_TEST_S)
    if status != 0:
        raise ProxyError(_explained(settings, said))


def _explained(settings: Settings, said: str) -> str:
    """What nginx said, and what to do where we know."""
    lines = [line for line in said.splitlines() if "[emerg]" in line] or said.splitlines()
    problem = lines[0].partition("[emerg] ")[2] or lines[0] if lines else "it said nothing"
    remedy = "the configuration is written anew at every start: see the folder's certificates"
    if "Permission denied" in problem and "bind" in problem:
        remedy = (
            f"port {settings.port} is for privileged programs: allow it to all (sysctl "
            f"net.ipv4.ip_unprivileged_port_start={settings.port}), give the service "
            "AmbientCapabilities=CAP_NET_BIND_SERVICE, or use a port above 1023 in study.json"
        )
    return f"nginx does not take its configuration: {problem}; {remedy}"
