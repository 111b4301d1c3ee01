"""The trainer as a service: one door for every relay of this hospital, one task at a time.

It listens on a Unix socket, or on a loopback port where a bearer token is asked for. A body goes to
a file as it comes and is cut off where it is larger than any task of the plan; only so many are let
in at a time, so that the disk which they can fill is bounded, and nothing is parsed before it is
whole. One thread works on one task; a relay that went away meanwhile finds the answer stored, and
one that brings the same task again before that is told at once that it is being worked on (409).
Answers that are held until their time are held beside that thread, so that other studies go on;
until then nothing leaves that could tell when the work ended: neither an answer to whatever waited
behind it, nor what is said of who is busy.
Nothing that is said here names a patient, and a refusal has a status and no text.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import queue
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from h11 import LocalProtocolError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fedseg.errors import DataError, FedsegError
from fedseg.logs import without_its_text
from sites.admission import StrangerError
from sites.folder import SiteFolder
from sites.gate import Doing, FloodError, Gate
from sites.outbox import Answer, Ready
from sites.rights import make_folder

logger = logging.getLogger(__name__)

PIECE = 1024 * 1024
BYTES = "application/octet-stream"
SILENCE_S, BODY_S = 60.0, 900.0
MOST_WAITING = 16
MOST_HELD = 8  # tasks of one study that holds its answers, from when they come till they leave
Opens = Callable[[str], Gate]
Reason = Callable[[], str | None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Spooled:
    """A whole body in a file, and its SHA-256."""

    path: Path
    digest: bytes


class Desk:
    """The gates of all joined studies, and the one thread that works on tasks."""

    def __init__(self, folder: SiteFolder, open_gate: Opens, closed: Reason, refused: Tell) -> None:
        """Make a desk; nothing is opened before it is asked for.

        Args:
            open_gate: opens the gate of a joined study.
            closed: why no task is taken just now, such as "paused"; None while they are.
            refused: audits what is turned away before it reaches a gate; told the reason.
        """
        self._folder, self._open_gate = folder, open_gate
        self.closed, self.refused = closed, refused
        self.waiting = 0  # tasks that are spooled, wait for their turn, are worked on or held
        self._inside: Counter[Gate] = Counter()
        self._at_work: set[bytes] = set()  # envelopes that wait, are worked on or held, by digest
        self._under_way: set[asyncio.Task[Ready]] = set()
        self._releases = ThreadPoolExecutor(1, thread_name_prefix="fedseg-egress")
        self._gates: dict[str, tuple[tuple[int, int], Gate]] = {}
        self._jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True, name="fedseg-tasks").start()

    def gate(self, study: str) -> Gate | None:
        """The gate of a study, opened anew where it was joined anew; None where it was not joined.

        Raises:
            FedsegError: what was pinned cannot be read or was edited.
        """
        try:
            found = self._folder.bundle(study).stat()
        except (DataError, OSError):
            self._gates.pop(study, None)
            return None
        mark = (found.st_ino, found.st_mtime_ns)
        with self._lock:
            if study not in self._gates or self._gates[study][0] != mark:
                self._gates[study] = (mark, self._open_gate(study))
            return self._gates[study][1]

    async def handle(self, gate: Gate, envelope: Spooled) -> Answer | None:
        """Have a task worked on; it goes on to its end even where nobody waits for it any more.

        Returns:
            The answer, or None where the very same envelope is being worked on already.

        Raises:
            FloodError: so many tasks of a study that holds its answers are here already.
        """
        if envelope.digest in self._at_work:
            envelope.path.unlink(missing_ok=True)
            return None
        if gate.holds and self._inside[gate] >= MOST_HELD:
            envelope.path.unlink(missing_ok=True)
            raise FloodError("too many answers of one study are held")
        self._at_work.add(envelope.digest)
        self._inside[gate] += 1
        task = asyncio.create_task(self._due(gate, envelope, gate.clock.now()))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        ready = await asyncio.shield(task)
        return await asyncio.wrap_future(self._releases.submit(gate.release, ready))

    async def _due(self, gate: Gate, envelope: Spooled, came: float) -> Ready:
        """An answer whose time has come; so does what is none wait."""
        try:
            try:
                ready = await asyncio.wrap_future(self._prepared(gate, envelope.path, came))
            except Exception:
                await self._until(gate, self._silent_until(gate))
                raise
            await self._until(gate, ready.due if ready.due > came else self._silent_until(gate))
            return ready
        finally:
            self._at_work.discard(envelope.digest)
            self._inside[gate] -= 1

    def _silent_until(self, own: Gate) -> float:
        """When the last answer is due that work was begun on.

        Whatever the one thread has come to since has waited for that work, or shows that it ended.
        """
        return max(gate.silent_until for gate in (own, *(g for _, g in list(self._gates.values()))))

    async def _until(self, gate: Gate, due: float) -> None:
        """Wait for a time."""
        while (left := due - gate.clock.now()) > 0:
            await asyncio.sleep(left)

    def _prepared(self, gate: Gate, path: Path, came: float) -> Future[Ready]:
        """The answer once the one thread has worked on the task."""
        found: Future[Ready] = Future()

        def job() -> None:
            try:
                ready = gate.prepare(path, came)
            except BaseException as error:
                found.set_exception(error)
            else:
                found.set_result(ready)
            finally:
                path.unlink(missing_ok=True)

        self._jobs.put(job)
        return found

    def warm_up(self) -> None:
        """Import what training needs before the first task asks for it: it takes seconds."""
        self._jobs.put(lambda: find_spec("torch") and import_module("sites.trainer"))

    @property
    def doing(self) -> Doing | None:
        """What is being worked on, or held: which of the two is not to be seen."""
        gates = [gate for _, gate in list(self._gates.values())]
        held = [gate.busy for gate in gates if gate.busy is not gate.doing]
        return next((each for each in (*held, *(g.doing for g in gates)) if each is not None), None)

    def _run(self) -> None:
        """One task after the other; nothing that one meets is the end of the others."""
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception as error:
                logger.error("the trainer could not do its work", extra=without_its_text(error))


def make_service(folder: SiteFolder, desk: Desk, token: str | None = None) -> ASGIApp:
    """The service as an ASGI application.

    Args:
        token: what every request must bear; None on a Unix socket, which its mode protects.
    """

    async def task(request: Request) -> Response:
        return await _task(folder, desk, request)

    async def health(_request: Request) -> Response:
        return JSONResponse({"ready": desk.closed() is None})

    async def status(_request: Request) -> Response:
        doing = desk.doing
        return JSONResponse(
            {
                "closed": desk.closed(),
                "doing": None if doing is None else asdict(doing),
                "waiting": max(0, desk.waiting - 1),
            }
        )

    routes = [
        Route("/studies/{study}/tasks", task, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
        Route("/status", status, methods=["GET"]),
    ]
    service = Starlette(
        routes=routes,
        middleware=[Middleware(_AnsweredAlready, desk.refused)],
        exception_handlers={500: _internal},
    )
    service.router.redirect_slashes = False  # a redirect would repeat the name that was asked for
    return service if token is None else _Guarded(service, token, desk.refused)


async def _task(folder: SiteFolder, desk: Desk, request: Request) -> Response:
    """Answer a task; what cannot be answered becomes a status."""
    if desk.closed() is not None or desk.waiting >= MOST_WAITING:
        return _status(503)
    desk.waiting += 1
    try:
        return await _answered(folder, desk, request)
    except StrangerError:
        return _status(403)
    except FloodError:
        return _status(429)
    except (ClientDisconnect, TimeoutError):
        return _status(400)
    except (FedsegError, OSError) as error:
        reason = error if isinstance(error, FedsegError) else type(error).__name__
        logger.error("tasks cannot be taken: %s", reason)
        return _status(503)
    finally:
        desk.waiting -= 1


async def _answered(folder: SiteFolder, desk: Desk, request: Request) -> Response:
    """Spool a task, have it worked on, stream the answer."""
    study = request.path_params["study"]
    gate = desk.gate(study)
    if gate is None:
        desk.refused("a task came for a study that is not joined")
        return _status(404)
    envelope = await _spooled(request, folder.spool(study), gate.max_bytes)
    if envelope is None:
        desk.refused(f"a task of {study} came that is larger than its plan allows")
        return _status(413)
    answer = await desk.handle(gate, envelope)
    return _status(409) if answer is None else _response(answer)


async def _spooled(request: Request, spool: Path, max_bytes: int) -> Spooled | None:
    """The body in a file, or None where it is larger than allowed."""
    claimed = request.headers.get("content-length", "")
    if claimed.isdigit() and int(claimed) > max_bytes:
        return None
    with tempfile.NamedTemporaryFile(dir=make_folder(spool), delete=False) as file:
        path = Path(file.name)
        try:
            size, hasher = 0, hashlib.sha256()
            async with asyncio.timeout(BODY_S):
                async for piece in _pieces(request):
                    size += len(piece)
                    if size > max_bytes:
                        path.unlink()
                        return None
                    file.write(piece)
                    hasher.update(piece)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return Spooled(path, hasher.digest())


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes; who stays silent for a minute is not waited for."""
    stream = request.stream()
    while True:
        async with asyncio.timeout(SILENCE_S):
            try:
                piece = await anext(stream)
            except StopAsyncIteration:
                return
        yield piece


def _response(answer: Answer) -> Response:
    """An answer as a response."""
    if isinstance(answer, bytes):
        return Response(answer, media_type=BYTES)
    return _Stored(answer)


class _Stored(Response):
    """A stored answer, piece by piece; it is opened at once, so that no later round clears it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        size = os.fstat(self._file.fileno()).st_size
        super().__init__(headers={"content-length": str(size)}, media_type=BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._file as file:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            more = True
            while more:
                piece = file.read(PIECE)
                more = len(piece) == PIECE
                await send({"type": "http.response.body", "body": piece, "more_body": more})


def _status(code: int) -> Response:
    """A status without a word, and the end of the connection; 429 and 503 ask to be asked later."""
    headers = {"connection": "close"} | ({"retry-after": "5"} if code in {429, 503} else {})
    return Response(status_code=code, headers=headers)


async def _internal(_request: Request, error: Exception) -> Response:
    """Nothing of an error leaves but that there was one."""
    logger.error("a request failed", exc_info=error)
    return _status(500)


class _AnsweredAlready:
    """Says nothing where the web server itself has answered a body that it could not read."""

    def __init__(self, service: ASGIApp, refused: Tell) -> None:
        self._service, self._refused = service, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        try:
            await self._service(scope, receive, send)
        except LocalProtocolError:
            self._refused("a request came whose body is malformed")


class _Guarded:
    """Asks every request for a token."""

    def __init__(self, service: ASGIApp, token: str, refused: Tell) -> None:
        self._service, self._expected = service, b"Bearer " + token.encode()
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http":
            given: list[Any] = [v for k, v in scope["headers"] if k == b"authorization"]
            if len(given) != 1 or not hmac.compare_digest(given[0], self._expected):
                self._refused("a request came without the token")
                await Response(status_code=401)(scope, receive, send)
                return
        await self._service(scope, receive, send)
