"""The relay's client: it waits for a trainer that is away and takes no half answer."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fedseg.errors import RoundError, TrustError
from sites.client import MOST_LOST, PIECE, Clock, Door, ask, status
from sites.folder import SiteFolder
from sites.listening import Place, opened_place

TASK = bytes(range(256)) * 5000
Behaviour = Callable[[socket.socket, bytes], None]


def head(status: str, length: int) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n".encode()


def answer(data: bytes) -> Behaviour:
    return lambda peer, _: peer.sendall(head("200 OK", len(data)) + data)


def refuse(status: str) -> Behaviour:
    return lambda peer, _: peer.sendall(head(status, 0))


def vanish(_peer: socket.socket, _request: bytes) -> None:
    """The trainer is killed while it works."""


def cut(peer: socket.socket, _request: bytes) -> None:
    peer.sendall(head("200 OK", 100) + b"half")


def read_request(peer: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += peer.recv(65536)
    before, _, body = data.partition(b"\r\n\r\n")
    lines = before.decode().split("\r\n")[1:]
    fields = dict(line.lower().split(": ", 1) for line in lines)
    while len(body) < int(fields.get("content-length", "0")):
        body += peer.recv(65536)
    return before + b"\r\n\r\n" + body


@contextmanager
def trainer(listener: socket.socket, *behaviours: Behaviour) -> Iterator[list[bytes]]:
    """Behaves once in each way, one connection after the other; collects the requests."""
    requests: list[bytes] = []
    listener.listen(8)

    def serve() -> None:
        for behave in behaviours:
            with suppress(OSError):
                peer, _ = listener.accept()
                with peer:
                    requests.append(read_request(peer))
                    behave(peer, requests[-1])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener:
        yield requests
    thread.join(5)


def unix(tmp_path: Path) -> tuple[socket.socket, Door]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    return listener, Door(f"unix:{tmp_path / 's'}")


def test_a_trainer_in_a_folder_with_a_long_path_is_reached(tmp_path: Path) -> None:
    place = tmp_path / ("deep" * 20) / ("deeper" * 20)
    place.mkdir(parents=True)
    door = Door(f"unix:{place / 'trainer.sock'}")
    with opened_place(SiteFolder(place), Place(door.address)) as (listener, _):
        listener.listen()
        with trainer(listener, answer(b"an answer")):
            assert ask(door, "tiny", TASK) == b"an answer"
    assert not (place / "trainer.sock").exists()


class Waiting:
    """A clock that jumps."""

    def __init__(self) -> None:
        self.time, self.waits = 0.0, []  # type: tuple[float, list[float]]

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.time, sleep=self.sleep)


def test_a_task_is_sent_whole_and_its_answer_comes_whole(tmp_path: Path) -> None:
    listener, door = unix(tmp_path)
    large = bytes(3 * PIECE + 17)
    with trainer(listener, answer(large)) as requests:
        assert ask(door, "tiny", TASK) == large
    before, _, body = requests[0].partition(b"\r\n\r\n")
    assert before.startswith(b"POST /studies/tiny/tasks HTTP/1.1")
    assert body == TASK


def test_the_task_is_sent_again_while_the_trainer_is_away_dies_or_is_paused(tmp_path: Path) -> None:
    listener, door = unix(tmp_path)
    waiting = Waiting()
    pause = refuse("503 Service Unavailable")
    with trainer(listener, vanish, cut, pause, answer(b"at last")) as requests:
        assert ask(door, "tiny", TASK, clock=waiting.clock) == b"at last"
    assert len(requests) == 4
    assert len(set(requests)) == 1
    assert len(waiting.waits) == 3


def test_patience_ends(tmp_path: Path) -> None:
    waiting = Waiting()
    door = Door(f"unix:{tmp_path / 'nobody'}")
    with pytest.raises(RoundError, match="No such file") as caught:
        ask(door, "tiny", TASK, patience_s=60, clock=waiting.clock)
    assert str(tmp_path) not in str(caught.value)
    assert 50 < sum(waiting.waits) <= 60


def test_a_task_over_which_the_trainer_always_ends_is_given_up(tmp_path: Path) -> None:
    listener, door = unix(tmp_path)
    waiting = Waiting()

    def work_and_vanish(_peer: socket.socket, _request: bytes) -> None:
        waiting.time += 3600

    ways = [work_and_vanish] * (MOST_LOST + 1)
    with (
        trainer(listener, *ways, answer(b"late")) as requests,
        pytest.raises(RoundError, match="ended"),
    ):
        ask(door, "tiny", TASK, clock=waiting.clock)
    assert len(requests) == len(ways)


@pytest.mark.parametrize("code", ["403 Forbidden", "404 Not Found", "413 Too Large", "500 Error"])
def test_a_refused_task_is_not_sent_again(code: str, tmp_path: Path) -> None:
    listener, door = unix(tmp_path)
    with trainer(listener, refuse(code)) as requests, pytest.raises(TrustError, match=code[:3]):
        ask(door, "tiny", TASK)
    assert len(requests) == 1


def test_a_port_is_asked_with_the_token_of_the_moment(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    token = tmp_path / "token"
    token.write_text("secret\n")
    door = Door(f"127.0.0.1:{listener.getsockname()[1]}", token)
    said = json.dumps({"state": "idle"}).encode()
    with trainer(listener, answer(b"answer"), answer(said), answer(b"[]")) as requests:
        assert ask(door, "tiny", TASK) == b"answer"
        assert status(door) == {"state": "idle"}
        with pytest.raises(RoundError):
            status(door)
    assert all(b"Authorization: Bearer secret\r\n" in request for request in requests)
