"""The in-process Grid: hung nodes, crashes, late messages, one thread a node."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedseg.carriage import ACTION, MESSAGE_TYPE, unwrap, wrap
from fedseg.errors import TrustError
from fedseg.simulation.inprocess import InProcessGrid
from sites.app import make_app

PATIENCE_S = 0.05


def contexts(count: int) -> dict[int, Context]:
    return {
        node: Context(
            run_id=1, node_id=node, node_config={"id": node}, state=RecordDict(), run_config={}
        )
        for node in range(1, count + 1)
    }


def grid_of(work: Callable[[int, bytes], bytes], count: int = 3, **options: Any) -> InProcessGrid:
    """A grid whose nodes do `work(node, data)`."""

    def connect(context: Context) -> Callable[[bytes], bytes]:
        return lambda data: work(int(context.node_config["id"]), data)

    options = {"patience_s": PATIENCE_S} | options
    return InProcessGrid(make_app(connect), contexts(count), **options)


def task(node: int, data: bytes = b"x", ttl: float = 60.0) -> Message:
    return Message(wrap(data), dst_node_id=node, message_type=MESSAGE_TYPE, ttl=ttl)


def wait_for(grid: InProcessGrid, ids: list[str], seconds: float = 5.0) -> dict[str, Message]:
    """The replies that come in time, by message id."""
    found: dict[str, Message] = {}
    deadline = time.monotonic() + seconds
    while len(found) < len(ids) and time.monotonic() < deadline:
        for message_id in ids:
            for message in grid.pull_messages([message_id]):
                found[message_id] = message
        time.sleep(0.002)
    return found


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a hanging node waits for; opened at the end, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()


def test_every_node_answers_its_own_message() -> None:
    grid = grid_of(lambda node, data: data + b"%d" % node)
    ids = list(grid.push_messages([task(2, b"b"), task(1, b"a"), task(3, b"c")]))
    replies = wait_for(grid, ids)
    assert [unwrap(replies[i]) for i in ids] == [b"b2", b"a1", b"c3"]
    assert [replies[i].metadata.src_node_id for i in ids] == [2, 1, 3]
    assert list(grid.get_node_ids()) == [1, 2, 3]
    assert list(grid.pull_messages(ids)) == []


def test_send_and_receive_returns_every_reply() -> None:
    grid = grid_of(lambda _node, data: data)
    replies = grid.send_and_receive([task(1), task(2)], timeout=5)
    assert sorted(reply.metadata.src_node_id for reply in replies) == [1, 2]


def test_nodes_are_served_in_the_order_that_is_asked_for() -> None:
    served: list[int] = []

    def work(node: int, data: bytes) -> bytes:
        served.append(node)
        return data

    grid = grid_of(work, arrange=lambda nodes: sorted(nodes, reverse=True), patience_s=60)
    wait_for(grid, list(grid.push_messages([task(1), task(2), task(3)])))
    assert served == [3, 2, 1]


def test_nodes_are_served_one_after_the_other() -> None:
    at_work, most = [0], [0]

    def work(_node: int, data: bytes) -> bytes:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        time.sleep(0.005)
        at_work[0] -= 1
        return data

    grid = grid_of(work, patience_s=60)
    wait_for(grid, list(grid.push_messages([task(n) for n in (1, 2, 3) for _ in range(3)])))
    assert most == [1]


def test_a_node_that_hangs_holds_nobody_up(gate: threading.Event) -> None:
    def work(node: int, data: bytes) -> bytes:
        if node == 1:
            gate.wait()
        return data

    grid = grid_of(work)
    ids = list(grid.push_messages([task(1), task(2), task(3)]))
    assert wait_for(grid, ids[1:]).keys() == set(ids[1:])
    assert list(grid.pull_messages(ids[:1])) == []


def test_two_nodes_that_hang_hold_nobody_up(gate: threading.Event) -> None:
    def work(node: int, data: bytes) -> bytes:
        if node < 3:
            gate.wait()
        return data

    grid = grid_of(work)
    ids = list(grid.push_messages([task(1), task(2), task(3)]))
    assert wait_for(grid, ids[2:]).keys() == {ids[2]}


def test_one_node_is_never_served_by_two_threads(gate: threading.Event) -> None:
    inside: list[int] = []
    twice: list[int] = []

    def work(node: int, data: bytes) -> bytes:
        if node in inside:
            twice.append(node)
        inside.append(node)
        if data == b"hang":
            gate.wait()
        time.sleep(0.005)
        inside.remove(node)
        return data

    grid = grid_of(work)
    hung = list(grid.push_messages([task(1, b"hang"), task(2, b"hang")]))
    later = list(grid.push_messages([task(n) for n in (1, 2, 3)]))
    assert wait_for(grid, later, seconds=0.4).keys() == {later[2]}
    gate.set()
    assert wait_for(grid, hung + later[:2]).keys() == {*hung, *later[:2]}
    assert twice == []


@pytest.mark.parametrize("error", [RuntimeError, TrustError, MemoryError, SystemExit])
def test_an_exception_becomes_an_error_reply_that_tells_nothing(
    error: type[BaseException],
) -> None:
    def work(node: int, data: bytes) -> bytes:
        if node == 1:
            raise error("/data/patient_0815.nii.gz")
        return data

    grid = grid_of(work)
    ids = list(grid.push_messages([task(1), task(2)]))
    replies = wait_for(grid, ids)
    assert replies[ids[0]].has_error()
    assert "0815" not in replies[ids[0]].error.reason
    assert unwrap(replies[ids[1]]) == b"x"
    again = list(grid.push_messages([task(1), task(2)]))
    assert wait_for(grid, again).keys() == set(again)


def test_a_message_that_expired_while_it_waited_is_not_served(gate: threading.Event) -> None:
    served: list[bytes] = []

    def work(_node: int, data: bytes) -> bytes:
        served.append(data)
        if data == b"hang":
            gate.wait()
        return data

    grid = grid_of(work)
    grid.push_messages([task(1, b"hang")])
    late = list(grid.push_messages([task(1, b"late", ttl=0.05)]))
    time.sleep(0.1)
    gate.set()
    after = list(grid.push_messages([task(1, b"after")]))
    assert wait_for(grid, after).keys() == set(after)
    assert list(grid.pull_messages(late)) == []
    assert served == [b"hang", b"after"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_reply_that_comes_after_its_time_is_thrown_away(
    fails: bool, gate: threading.Event
) -> None:
    def work(_node: int, data: bytes) -> bytes:
        if data == b"late":
            gate.wait()
            if fails:
                raise RuntimeError
        return data

    grid = grid_of(work)
    late = list(grid.push_messages([task(1, b"late", ttl=0.05)]))
    time.sleep(0.1)
    gate.set()
    after = list(grid.push_messages([task(1), task(2)]))
    assert wait_for(grid, after).keys() == set(after)
    assert list(grid.pull_messages(late)) == []


def test_the_forwarding_app_refuses_other_content() -> None:
    grid = grid_of(lambda _node, data: data)
    odd = Message(RecordDict(), dst_node_id=1, message_type=f"query.{ACTION}", ttl=60.0)
    other = Message(wrap(b"x"), dst_node_id=2, message_type="train", ttl=60.0)
    ids = list(grid.push_messages([odd, other]))
    assert all(reply.has_error() for reply in wait_for(grid, ids).values())


def test_any_client_app_may_be_served() -> None:
    app = ClientApp()

    @app.query(ACTION)
    def answer(message: Message, _context: Context) -> Message:
        return Message(wrap(unwrap(message) * 2), reply_to=message)

    grid = InProcessGrid(app, contexts(1), patience_s=60)
    ids = list(grid.push_messages([task(1, b"ab")]))
    assert unwrap(wait_for(grid, ids)[ids[0]]) == b"abab"
