"""What left a hospital by its own list, and its service on a socket that leaves it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from small_hospitals import Hospital
from typer.testing import CliRunner, Result

from sites import cli
from sites.client import Door
from sites.folder import SiteFolder
from sites.gate import Gate
from sites.listening import Place, make_server, opened_place
from sites.outbox import Answer
from sites.service import Desk

STUDY = "tiny"


def size_of(answer: Answer) -> int:
    return len(bytes_of(answer))


def bytes_of(answer: Answer) -> bytes:
    return answer if isinstance(answer, bytes) else answer.read_bytes()


def egress(folder: SiteFolder, *words: object) -> Result:
    """Call `fedseg-site egress`."""
    args = ["egress", *map(str, words), "--site", str(folder.path)]
    result = CliRunner().invoke(cli.app, args, env={"COLUMNS": "250"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def listed(folder: SiteFolder, *words: object) -> list[dict[str, Any]]:
    """What `egress list --json` says."""
    lines = egress(folder, "list", "--json", *words).stdout.splitlines()
    return [json.loads(line) for line in lines]


@contextmanager
def serving(sites: dict[str, Hospital]) -> Iterator[tuple[Door, Desk]]:
    """One hospital's service for its studies, on its socket."""
    folder = next(iter(sites.values())).folder

    def open_gate(study: str) -> Gate:
        return sites[study].gate()

    desk = Desk(folder, open_gate, lambda: None, lambda _reason: None)
    place = Place(f"unix:{folder.socket}")
    with opened_place(folder, place) as (listener, _):
        server = make_server(folder, desk, None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield Door(place.address), desk
        server.should_exit = True
        thread.join(10)


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)
