"""Who may look: one ASGI layer before every page.

In this order: only reading is possible (GET and HEAD; POST to the login form alone); on loopback
only a local name may be asked for, so that no web page elsewhere can reach this one by pointing a
name of its own at 127.0.0.1; where a token is set, it must come in the Authorization header or as
the cookie that the login form sets. The token is in no URL and no log; the cookie is derived from
it and does not tell it. Every answer carries a policy that forbids all outside resources.
"""

from __future__ import annotations

import hmac
import re
import secrets
from contextlib import suppress
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedseg.errors import DataError, TrustError
from fedseg.security.secretfile import read_secret, write_secret

COOKIE = "fedseg-dashboard"
LOGIN = "/login"
OPEN = frozenset({LOGIN, "/style.css"})
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,128}")


class Guard:
    """The layer. `token` None: everybody who reaches the address may look."""

    def __init__(self, app: ASGIApp, *, token: str | None, local: bool) -> None:
        self._app, self._token, self._local = app, token, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass or answer it here."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        answer = self._refusal(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (answer or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that may not pass, or None."""
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        if method not in ("GET", "HEAD") and (method, path) != ("POST", LOGIN):
            return PlainTextResponse("This page only looks.\n", 405, {"Allow": "GET, HEAD"})
        if self._local and _name_of(headers.get("host", "")) not in LOCAL_NAMES:
            return PlainTextResponse("Ask for this page as 127.0.0.1 or localhost.\n", 421)
        if self._token is None or path in OPEN or self._known(headers, self._token):
            return None
        if path == "/":
            return RedirectResponse(LOGIN, 303)
        return PlainTextResponse("A token is needed.\n", 401, {"WWW-Authenticate": "Bearer"})

    def _known(self, headers: Headers, token: str) -> bool:
        """Does the request bring the token, or the cookie made of it?"""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same(given.strip(), token):
            return True
        return same(_cookie_of(headers), cookie_of(token))


def same(given: str, expected: str) -> bool:
    """Compare in a time that does not tell how much is right."""
    return hmac.compare_digest(given.encode(), expected.encode())


def cookie_of(token: str) -> str:
    """What a browser keeps in place of the token."""
    return hmac.digest(token.encode(), b"fedseg dashboard cookie", sha256).hex()


def dashboard_token(path: Path) -> str:
    """The token of this study's page; made where there is none.

    Raises:
        TrustError: others may read the file, or it holds no token.
        StorageError: it cannot be made.
    """
    if not path.exists():
        with suppress(DataError):  # another dashboard made one just now
            write_secret(path, secrets.token_urlsafe(32).encode() + b"\n")
    token = read_secret(path).decode("ascii", "replace").strip()
    if not _TOKEN.fullmatch(token):
        raise TrustError(f"{path.name} holds no token: remove it, so that a new one is made")
    return token


def _name_of(host: str) -> str:
    """The Host header without its port."""
    return re.sub(r":\d{0,5}$", "", host).lower()


def _cookie_of(headers: Headers) -> str:
    """Our cookie, or nothing."""
    try:
        jar = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return jar[COOKIE].value if COOKIE in jar else ""
