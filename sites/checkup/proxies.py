"""Web proxies: which one the relay would use for a coordinator, and the way through it.

The relay takes proxy settings from the environment of the daemon, as Flower's HTTP client reads
them; the doctor reads the same names and asks the proxy for the same tunnel. What a proxy's address
holds besides host and port (a password) is never shown.
"""

from __future__ import annotations

import socket
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

from sites.checkup.verdict import Verdict, fail, plain, well

_NAMES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
_NONE = ("no_proxy", "NO_PROXY")
_CONNECT = "CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n{login}\r\n"


class ProxyRefusedError(OSError):
    """The proxy does not open a tunnel to the coordinator."""


@dataclass(frozen=True)
class WebProxy:
    """A proxy between here and the coordinator.

    Attributes:
        name: the variable that names it.
        url: as it was set; it may hold a password.
    """

    name: str
    url: str

    @property
    def shown(self) -> str:
        """Host and port."""
        parts = self._parts
        return f"{plain(parts.hostname or '?')}:{parts.port or 80}"

    @property
    def usable(self) -> bool:
        """Whether it is one of the kind that the doctor can look through."""
        return self._parts.scheme == "http" and bool(self._parts.hostname)

    def tunnel(self, address: str, timeout_s: float) -> socket.socket:
        """A connection to the coordinator through the proxy.

        Raises:
            ProxyRefusedError: the proxy does not allow it; the text says what it answered.
            OSError: the proxy cannot be reached.
        """
        parts = self._parts
        raw = socket.create_connection((parts.hostname, parts.port or 80), timeout=timeout_s)
        try:
            raw.sendall(_CONNECT.format(address=address, login=_login(parts)).encode("ascii"))
            response = HTTPResponse(raw, method="CONNECT")
            response.begin()
        except (HTTPException, ValueError):
            raw.close()
            raise ProxyRefusedError(f"{self.shown} is no web proxy") from None
        except OSError:
            raw.close()
            raise
        if response.status != 200:
            raw.close()
            raise ProxyRefusedError(
                f"the proxy {self.shown} answers {response.status} {plain(response.reason, 60)}"
            )
        return raw

    @property
    def _parts(self) -> SplitResult:
        """The address taken apart."""
        return urlsplit(self.url if "://" in self.url else f"http://{self.url}")


def proxy_for(host: str, environment: Mapping[str, str]) -> WebProxy | None:
    """The proxy that the relay uses for a host, or None where it dials directly."""
    spared = ",".join(environment[name] for name in _NONE if environment.get(name))
    if spared and proxy_bypass_environment(host, {"no": spared}):
        return None
    for name in _NAMES:
        if environment.get(name):
            return WebProxy(name, environment[name])
    return None


def settings(study: str, host: str, proxy: WebProxy | None) -> Verdict:
    """What the settings in this environment come to."""
    subject = f"Proxy settings ({study})"
    if proxy is None:
        return well(subject, f"{host} is dialled directly")
    if not proxy.usable:
        return fail(
            subject,
            f"{proxy.name} names a proxy that is not of the form http://HOST:PORT",
            f"set {proxy.name} to http://HOST:PORT, or name {host} in NO_PROXY",
        )
    return well(
        subject,
        f"{host} is dialled through {proxy.shown} ({proxy.name}); the service needs the same "
        "setting",
    )


def _login(parts: SplitResult) -> str:
    """The header that carries name and password, where there are any."""
    if parts.username is None:
        return ""
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Proxy-Authorization: Basic {b64encode(pair.encode()).decode()}\r\n"
