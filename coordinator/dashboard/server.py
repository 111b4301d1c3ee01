"""The web server of one study's page: it reads files of the study folder and writes none.

Every request reads run/progress.json anew when it changed. What is asked for again and did not
change is answered with 304, so a page that asks every two seconds costs next to nothing.
"""

from __future__ import annotations

import asyncio
from hashlib import sha256
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp

from coordinator.dashboard.guard import COOKIE, LOGIN, Guard, cookie_of, same
from coordinator.dashboard.page import TEMPLATES, environment, render
from coordinator.dashboard.reading import Reader
from fedseg.plan import StudyPlan

MAX_FORM_BYTES = 1024
LONGEST_FORM_S = 10.0
AFTER_A_WRONG_TOKEN_S = 0.5


def make_dashboard(
    reader: Reader, plan: StudyPlan, *, token: str | None, local: bool, secure: bool = False
) -> ASGIApp:
    """The page behind its guard.

    Args:
        token: what a visitor must know; None lets everybody in who reaches the address.
        local: the address is of this machine only.
        secure: it is reached over TLS, and the cookie must not travel without.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    files = {name: (TEMPLATES / name).read_bytes() for name in ("style.css", "live.js")}

    @app.api_route("/", methods=["GET", "HEAD"])
    def page(request: Request) -> Response:
        return _tagged(request, render(plan, *reader.read()).encode(), "text/html; charset=utf-8")

    @app.api_route("/progress.json", methods=["GET", "HEAD"])
    def document(request: Request) -> Response:
        progress, _ = reader.read()
        data = progress.model_dump_json(indent=2) if progress else "null"
        return _tagged(request, data.encode(), "application/json")

    @app.api_route("/style.css", methods=["GET", "HEAD"])
    def style(request: Request) -> Response:
        return _tagged(request, files["style.css"], "text/css; charset=utf-8")

    @app.api_route("/live.js", methods=["GET", "HEAD"])
    def script(request: Request) -> Response:
        return _tagged(request, files["live.js"], "text/javascript; charset=utf-8")

    @app.api_route(LOGIN, methods=["GET", "HEAD"])
    def door() -> Response:
        return _door() if token else RedirectResponse("/", 303)

    @app.post(LOGIN)
    async def enter(request: Request) -> Response:
        if token is None or same(await _given(request), token):
            answer = RedirectResponse("/", 303)
            if token:
                answer.set_cookie(
                    COOKIE, cookie_of(token), httponly=True, samesite="strict", secure=secure
                )
            return answer
        await asyncio.sleep(AFTER_A_WRONG_TOKEN_S)
        return _door(wrong=True)

    return Guard(app, token=token, local=local)


def _door(wrong: bool = False) -> Response:
    """The form that asks for the token."""
    page = environment().get_template("login.html").render(wrong=wrong)
    return HTMLResponse(page, 403 if wrong else 200)


async def _given(request: Request) -> str:
    """The token that the form brings; the body is bounded in size and time while it is read."""
    body = b""
    try:
        async with asyncio.timeout(LONGEST_FORM_S):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_FORM_BYTES:
                    return ""
    except (ClientDisconnect, TimeoutError):
        return ""
    return parse_qs(body.decode("ascii", "replace")).get("token", [""])[0].strip()


def _tagged(request: Request, data: bytes, kind: str) -> Response:
    """The data, or 304 where the browser has it."""
    tag = f'"{sha256(data).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(data, headers={"ETag": tag, "Content-Type": kind})
