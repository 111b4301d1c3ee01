"""The trainer's service over a real socket: what comes in, in which bounds, and what is said."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from small_hospitals import (
    Hospital,
    copied,
    fixture_data,  # noqa: F401
    fixture_founded,  # noqa: F401
)

from fedseg.errors import DataError, RoundError, TrustError
from sites import service
from sites.client import BusyError, Door, ask, status
from sites.gate import Gate
from sites.listening import Place, closed_because, make_server, opened_place
from sites.service import Desk


@pytest.fixture
def site(founded: Hospital, tmp_path: Path) -> Hospital:
    """A hospital that has answered nothing yet."""
    return copied(founded, tmp_path / "s")


@contextmanager
def serving(site: Hospital, address: str | None = None) -> Iterator[tuple[Door, Desk]]:
    """The service of a hospital, in a thread; listens where it says."""
    folder = site.folder
    refused: list[str] = []
    desk = Desk(folder, lambda _: site.gate(), lambda: closed_because(folder), refused.append)
    place = Place(address or f"unix:{folder.socket}")
    with opened_place(folder, place) as (listener, token):
        server = make_server(folder, desk, token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        where = address and f"127.0.0.1:{listener.getsockname()[1]}"
        yield Door(where or place.address, folder.token if token else None), desk
        server.should_exit = True
        thread.join(10)


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def say(door: Door, *pieces: bytes, wait: bool = True) -> bytes:
    """Send bytes as they are, and what comes back."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(door.address.removeprefix("unix:"))
        peer.settimeout(20)
        for piece in pieces:
            peer.sendall(piece)
        found = b""
        while wait and (more := peer.recv(65536)):
            found += more
        return found


def request(study: str, length: int | None, body: bytes = b"") -> bytes:
    size = "" if length is None else f"Content-Length: {length}\r\n"
    head = f"POST /studies/{study}/tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{size}\r\n"
    return head.encode() + body


def spooled(site: Hospital) -> list[Path]:
    return list(site.folder.spool("tiny").glob("*"))


def test_a_relay_gets_its_answer_and_the_same_one_again(site: Hospital) -> None:
    with serving(site) as (door, _):
        envelope = site.task()
        first = ask(door, "tiny", envelope)
        assert ask(door, "tiny", envelope) == first
        assert site.said(first).body.kind == "train"
        assert site.code(ask(door, "tiny", site.task(plan="0" * 64))) == "plan"
    assert site.trained == 1
    assert spooled(site) == []


def test_the_socket_is_its_owners_alone(site: Hospital) -> None:
    with serving(site):
        assert site.folder.socket.stat().st_mode & 0o777 == 0o600
    assert not site.folder.socket.exists()


def test_an_old_socket_is_taken_over_and_no_other_file(site: Hospital) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(site.folder.socket))
    with serving(site) as (door, _):
        assert status(door)["closed"] is None
    with (
        pytest.raises(DataError, match="cannot listen"),
        opened_place(site.folder, Place(f"unix:{site.folder.policy}")),
    ):
        pass
    assert site.folder.policy.is_file()


def test_a_group_may_be_let_in(site: Hospital) -> None:
    with opened_place(site.folder, Place(f"unix:{site.folder.socket}", group="root")):
        assert site.folder.socket.stat().st_mode & 0o777 == 0o660
    with (
        pytest.raises(DataError, match="group"),
        opened_place(site.folder, Place(f"unix:{site.folder.socket}", group="no-such-group")),
    ):
        pass


@pytest.mark.parametrize(
    "place", ["0.0.0.0:7070", "example.org:7070", "127.0.0.1:x", "unix:/" + "x" * 200]
)
def test_a_trainer_listens_on_loopback_alone(place: str, site: Hospital) -> None:
    with pytest.raises(DataError), opened_place(site.folder, Place(place)):
        pass


def test_a_port_asks_for_the_token(site: Hospital) -> None:
    with serving(site, "127.0.0.1:0") as (door, _):
        assert site.folder.token.stat().st_mode & 0o777 == 0o600
        assert site.said(ask(door, "tiny", site.task())).body.kind == "train"
        for given in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer wrong"}):
            with closing(Door(door.address).connection(10)) as connection:
                connection.request("POST", "/studies/tiny/tasks", body=b"x", headers=given)
                response = connection.getresponse()
                assert (response.status, response.read()) == (401, b"")
        with pytest.raises(RoundError):
            status(Door(door.address))


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (request("tiny", 5, b"wrong"), 403),
        (request("tiny", 0), 403),
        (request("other", 5, b"wrong"), 404),
        (request("..", 5, b"wrong"), 404),
        (request("%2e%2e%2ftiny", 5, b"wrong"), 404),
        (request("Tiny", 5, b"wrong"), 404),
        (request("tiny", 10**9), 413),
        (request("tiny", 10**30), 400),
        (b"GET /studies/tiny/tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
        (b"GET /docs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"garbage\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nA: " + b"x" * 20_000, 400),
    ],
)
def test_what_is_no_task_gets_a_status_and_no_word(sent: bytes, code: int, site: Hospital) -> None:
    with serving(site) as (door, _):
        found = say(door, sent)
        assert found.startswith(f"HTTP/1.1 {code} ".encode())
        assert str(site.folder.path).encode() not in found
        if code in {403, 413}:
            assert found.endswith(b"\r\n\r\n")
        assert site.said(ask(door, "tiny", site.task())).body.kind == "train"
    assert spooled(site) == []


def test_a_body_without_an_end_is_cut_off(site: Hospital) -> None:
    chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
    head = b"POST /studies/tiny/tasks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(site) as (door, desk):
        found = b""
        with suppress(BrokenPipeError, ConnectionResetError):
            found = say(door, head, *[chunk] * 100)
        assert not found or b" 413 " in found
        until(lambda: not spooled(site))
        assert desk.waiting == 0


def test_a_body_that_was_cut_short_is_forgotten(site: Hospital) -> None:
    envelope = site.task()
    with serving(site) as (door, desk):
        say(door, request("tiny", len(envelope), envelope[:5000]), wait=False)
        until(lambda: not spooled(site))
        assert desk.waiting == 0
    assert site.trained == 0
    assert not site.audited("refused")


def test_bodies_that_are_on_their_way_count_too_and_others_are_asked_to_wait(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MOST_WAITING", 2)
    envelope = site.task()
    with serving(site) as (door, desk):
        slow = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for peer in slow:
            peer.connect(door.address.removeprefix("unix:"))
            peer.sendall(request("tiny", len(envelope), envelope[:5000]))
        until(lambda: desk.waiting == 2)
        assert len(spooled(site)) <= 2
        with pytest.raises(RoundError, match="503"):
            ask(door, "tiny", envelope, patience_s=0)
        for peer in slow:
            peer.close()
        assert site.said(ask(door, "tiny", envelope, patience_s=20)).body.kind == "train"


def test_a_trainer_that_cannot_warm_up_still_works_on_tasks(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_name: str) -> None:
        raise OSError("a library is missing")

    monkeypatch.setattr(service, "import_module", broken)
    with serving(site) as (door, desk):
        desk.warm_up()
        assert site.said(ask(door, "tiny", site.task())).body.kind == "train"


def test_a_relay_that_went_away_finds_its_answer_stored(site: Hospital) -> None:
    envelope = site.task()
    with serving(site) as (door, desk):
        say(door, request("tiny", len(envelope), envelope), wait=False)
        until(lambda: len(site.audited("answered")) == 1 and desk.waiting == 0)
        assert site.said(ask(door, "tiny", envelope)).body.kind == "train"
    assert site.trained == 1


def test_a_task_that_is_being_worked_on_is_not_waited_for_twice(site: Hospital) -> None:
    envelope = site.task()
    answers: list[bytes] = []
    with serving(site) as (door, desk):
        first = threading.Thread(target=lambda: answers.append(ask(door, "tiny", envelope)))
        first.start()
        until(lambda: desk.waiting == 1 and desk.doing is not None)
        with pytest.raises(BusyError):
            ask(door, "tiny", envelope)
        first.join(30)
        assert ask(door, "tiny", envelope) == answers[0]
    assert site.trained == 1


def test_relays_wait_for_one_another_and_one_task_is_worked_on(site: Hospital) -> None:
    answers: list[bytes] = []
    envelopes = [site.task(round_=n) for n in (1, 1, 2)]
    with serving(site) as (door, desk):
        threads = [
            threading.Thread(target=lambda e=e: answers.append(ask(door, "tiny", e)))
            for e in envelopes
        ]
        for thread in threads:
            thread.start()
        until(lambda: desk.doing is not None)
        said = status(door)
        assert said["doing"]["study"] == "tiny"
        assert said["doing"]["stage"] == "train"
        assert set(said) == {"closed", "doing", "waiting"}
        for thread in threads:
            thread.join(30)
    assert len(answers) == 3
    assert len(set(answers)) == 2
    assert site.trained == 2


def test_a_paused_site_takes_no_task_and_the_relay_waits(site: Hospital) -> None:
    site.folder.paused.write_text("")
    with serving(site) as (door, _):
        assert status(door)["closed"] == "paused"
        with pytest.raises(RoundError, match="resume"):
            ask(door, "tiny", site.task(), patience_s=0.5)
        threading.Timer(0.5, site.folder.paused.unlink).start()
        assert site.said(ask(door, "tiny", site.task(), patience_s=20)).body.kind == "train"


def test_a_policy_that_cannot_be_read_closes_the_door(site: Hospital) -> None:
    site.folder.policy.write_text("hours: whenever\n")
    with serving(site) as (door, _), pytest.raises(RoundError):
        ask(door, "tiny", site.task(), patience_s=0)
    assert "hours" in str(closed_because(site.folder))


def test_a_study_that_was_left_is_unknown_and_one_that_was_edited_is_not_served(
    site: Hospital,
) -> None:
    bundle = site.folder.bundle("tiny")
    with serving(site) as (door, _):
        assert site.said(ask(door, "tiny", site.task())).body.kind == "train"
        whole = bundle.read_bytes()
        bundle.unlink()
        with pytest.raises(TrustError, match="404"):
            ask(door, "tiny", site.task())
        bundle.write_bytes(whole)
        assert site.said(ask(door, "tiny", site.task())).body.kind == "train"


def test_an_audit_that_cannot_be_written_closes_the_door(site: Hospital) -> None:
    def gate(_study: str) -> Gate:
        raise DataError("the pinned bundle cannot be read")

    with serving(site) as (door, desk):
        desk._open_gate = gate
        with pytest.raises(RoundError, match="503"):
            ask(door, "tiny", site.task(), patience_s=0)
