"""Seeded harm: bytes and requests that no honest program sends, the same ones for the same seed.

Three kinds. `mutated` spoils something genuine, so that it gets deep into a parser before it is
seen to be wrong; `noise` is nothing at all; `request` speaks HTTP badly. `Bounds` says what an
input may cost the process that reads it.
"""

from __future__ import annotations

import json
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fedseg.errors import FedsegError

ODD_BYTES = (
    *(
        b"",
        b"\x00",
        b"\xff",
        b"\n",
        b"\r\n",
        b'"',
        b"\\",
        b"{",
        b"[",
        b"}",
        b",",
        b"\xf0\x9f\x98\x80",
    ),
    *(b"\xed\xa0\x80", b"\xef\xbb\xbf", b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400),
    *(b"\x1b[2J", b"../../etc/passwd", b"%s%n", b"[" * 300, b'{"a":' * 300, b"\\u0000", b"\\ud800"),
    *(
        b"!!python/object:os.system",
        b"&a [*a, *a]",
        b"? ",
        b"---\n",
        b"!!int abc",
        b"0x" + b"f" * 99,
    ),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, -0.0, "", "x", "x" * 5000),
    *(
        "\x00",
        "../x",
        "é",
        "\u202e",
        "a" * 64,
        "A" * 86 + "==",
        [],
        {},
        [[]],
        {"": {}},
        [None] * 300,
    ),
    *("0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+14:00", "2026-02-30T00:00:00Z"),
)
ODD_LENGTHS = (0, 1, 7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
TERMINAL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
LONGEST_MESSAGE = 4000


def mutated(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Something genuine, spoilt in one to four places."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_SPOILERS)(rng, data, others)
    return data


def noise(rng: Random) -> bytes:
    """Bytes without sense, most of them few."""
    return rng.randbytes(rng.choice((0, 1, 3, 12, 100, 1000, 20_000)))


def spoilt_json(rng: Random, data: bytes, _others: Sequence[bytes] = ()) -> bytes:
    """A JSON document that still is one, with an odd value, a missing or an unknown field."""
    try:
        value = json.loads(data)
    except ValueError:
        return mutated(rng, data)
    places = list(_places(value))
    if not places:
        return mutated(rng, data)
    inside, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[rng.choice(("", "extra", "__class__", "\ud800", "x" * 999))] = rng.choice(ODD_VALUES)
    elif kind == 2:
        inside[key] = [inside[key]] * rng.choice((1, 2, 50))
    else:
        inside[key] = rng.choice(ODD_VALUES)
    spaces = (",", ":") if rng.random() < 0.8 else None
    return json.dumps(value, sort_keys=True, separators=spaces).encode("utf-8", "surrogatepass")


def request(rng: Random, paths: Sequence[str], bodies: Sequence[bytes]) -> bytes:
    """An HTTP request with something wrong in its line, its headers, its framing or its path."""
    body = rng.choice(bodies)
    body = body if rng.random() < 0.3 else mutated(rng, body)
    method = rng.choice(
        ("POST", "POST", "POST", "GET", "PUT", "post", "", "CONNECT", "P" * 500, "\x00")
    )
    path = rng.choice(paths) if rng.random() < 0.5 else _odd_path(rng, rng.choice(paths))
    version = rng.choice(("HTTP/1.1",) * 6 + ("HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "", "http/1.1"))
    headers = [("Host", "localhost"), *rng.sample(_ODD_HEADERS, rng.choice((0, 0, 1, 3)))]
    framing, sent = _framed(rng, body)
    lines = [f"{method} {path} {version}", *(f"{k}: {v}" for k, v in (*headers, *framing))]
    end = rng.choice(("\r\n",) * 8 + ("\n", "\r", "\r\n\t"))
    head = end.join((*lines, "", "")).encode("latin-1", "replace")
    whole = head + sent
    return mutated(rng, whole) if rng.random() < 0.2 else whole


@dataclass
class Bounds:
    """What inputs may cost: typed errors alone, short clean messages, little time and memory.

    Attributes:
        secrets: texts that no message may hold, such as the folder's path.
        tried: inputs that were given, and by kind of outcome how many.
    """

    errors: tuple[type[Exception], ...] = (FedsegError,)
    secrets: tuple[str, ...] = ()
    slowest_s: float = 2.0
    tried: dict[str, int] = field(default_factory=dict)

    def attempt(self, opens: Callable[[bytes], Any], data: bytes) -> tuple[bool, Any]:
        """Give one input: whether it was taken, and what it opened to."""
        started = time.thread_time()
        try:
            found = opens(data)
        except self.errors as error:
            self._count(type(error).__name__)
            self._check_message(str(error))
            return False, None
        finally:
            assert time.thread_time() - started < self.slowest_s, f"{len(data)} bytes took too long"
        self._count("taken")
        return True, found

    def _count(self, outcome: str) -> None:
        self.tried[outcome] = self.tried.get(outcome, 0) + 1

    def _check_message(self, said: str) -> None:
        assert said and len(said) <= LONGEST_MESSAGE, f"a message of {len(said)} characters"
        assert not TERMINAL.search(said), f"a message that a terminal would act on: {said!r}"
        assert not any(secret in said for secret in self.secrets), said


@contextmanager
def little_memory(megabytes: int, pid: int | None = None) -> Iterator[None]:
    """No more than this is needed besides what was in use at the start, and no file stays open.

    Args:
        pid: another process of ours; None is this one.
    """
    place = Path("/proc") / str(pid or os.getpid())
    (place / "clear_refs").write_text("5")  # the peak is measured anew
    before, files = _memory(place, "VmRSS"), len(list((place / "fd").iterdir()))
    yield
    grown = _memory(place, "VmHWM") - before
    assert grown < megabytes * 1024, f"the process grew by {grown // 1024} MB"
    deadline = time.monotonic() + 10
    while len(list((place / "fd").iterdir())) > files + 8 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(list((place / "fd").iterdir())) <= files + 8, "files or sockets stayed open"


def _memory(place: Path, what: str) -> int:
    """A line of a process's status, in KB."""
    match = re.search(rf"^{what}:\s+(\d+) kB", (place / "status").read_text(), re.MULTILINE)
    assert match
    return int(match[1])


def _flip(rng: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    if not data:
        return noise(rng)
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _cut(rng: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(rng: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 8, 64)) :]


def _repeat(rng: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at : at + rng.choice((1, 16, 256))] * rng.choice((2, 3, 40)) + data[at:]


def _insert(rng: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    odd = rng.choice(ODD_BYTES)
    return data[:at] + odd + data[at + rng.choice((0, len(odd))) :]


def _length(rng: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    """Another number where a length may stand: near the start, in any width and order."""
    at = rng.randrange(min(len(data), 16) + 1)
    width = rng.choice("BHIQ")
    number = rng.choice(ODD_LENGTHS) % 2 ** (8 * struct.calcsize(width))
    raw = struct.pack(rng.choice("<>") + width, number)
    return data[:at] + raw + data[at + len(raw) :]


def _splice(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others) if others else noise(rng)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _extend(rng: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    return data + rng.choice((b"\x00", b"\n", b" " * 100, data[:50], rng.randbytes(9)))


def _json_inside(rng: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    """Spoil the first JSON object in the bytes, and mend a length of four or eight before it."""
    start = data.find(b"{")
    if start < 0 or start > 64:
        return _flip(rng, data, ())
    text = data[start:].decode("latin-1")
    with suppress(ValueError, RecursionError):
        _, size = json.JSONDecoder().raw_decode(text)
        new = spoilt_json(rng, data[start : start + size])
        head = data[:start]
        if start >= 8 and int.from_bytes(head[-8:], "little") >= size:
            head = head[:-8] + len(new).to_bytes(8, "little")
        elif start >= 4 and int.from_bytes(head[-4:], "big") == size:
            head = head[:-4] + len(new).to_bytes(4, "big")
        return head + new + data[start + size :]
    return _flip(rng, data, ())


_SPOILERS = (_flip, _flip, _cut, _drop, _repeat, _insert, _length, _splice, _extend)
_SPOILERS = (*_SPOILERS, _json_inside, _json_inside, _json_inside)


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with every key in it."""
    if depth > 20 or not isinstance(value, dict | list):
        return
    keys = list(value) if isinstance(value, dict) else list(range(min(len(value), 50)))
    for key in keys:
        yield value, key
        yield from _places(value[key], depth + 1)


_ODD_HEADERS = [
    ("Host", "evil.example"), ("Content-Length", "5"), ("Content-Length", "-1"),
    ("Content-Length", "9" * 20), ("Content-Length", "0x10"), ("Content-Length", "+5"),
    ("Content-Length", "5, 6"), ("Content-Length", "\xb2"), ("Transfer-Encoding", "chunked"),
    ("Transfer-Encoding", "gzip, chunked"), ("Transfer-Encoding", "identity"),
    ("Expect", "100-continue"), ("Expect", "x"),
    ("Connection", "close, keep-alive, upgrade"), ("Upgrade", "websocket"),
    ("Upgrade", "h2c"), ("Authorization", "Bearer "), ("Authorization", "\xff" * 200),
    ("Cookie", "fedseg-dashboard=" + "a" * 64), ("Cookie", "=;;=\x01"),
    ("If-None-Match", "*" * 900),
    ("X-Forwarded-For", "127.0.0.1"), ("X" * 3000, "y"), ("X", "y" * 30_000), ("", "x"),
    (" A", "b"), ("A B", "c"), ("Range", "bytes=0-,-9"),
    ("Content-Type", "multipart/form-data; boundary=" + "b" * 300),
]  # fmt: skip


def _odd_path(rng: Random, path: str) -> str:
    odd = (
        *(
            "..",
            "%2e%2e",
            "%00",
            "%",
            "%zz",
            "//",
            ";x",
            "?" + "q=1&" * 200,
            "#f",
            "\\",
            "\xff",
            "*",
        ),
        *("a" * 9000, "%2f" * 30, " ", "http://x/", "é", "..%2f..%2fetc%2fpasswd", "\t", "%c0%ae"),
    )
    at = rng.randrange(len(path) + 1)
    return path[:at] + rng.choice(odd) + path[at + rng.choice((0, 1, 5)) :]


def _framed(rng: Random, body: bytes) -> tuple[list[tuple[str, str]], bytes]:
    """Headers that say how long a body is, and the body; in half of the cases they agree."""
    kind = rng.randrange(8)
    if kind < 3:
        return [("Content-Length", str(len(body)))], body
    if kind == 3:
        return [("Content-Length", str(len(body) + rng.choice((-1, 1, 50, 10**9))))], body
    if kind == 4:
        return [], body
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in (body[:100], body[100:]) if c)
    if kind == 5:
        return [("Transfer-Encoding", "chunked")], chunks + b"0\r\n\r\n"
    if kind == 6:
        bad = rng.choice((b"zz\r\n", b"-1\r\n", b"f" * 40 + b"\r\n", b"5\r\nab", b"0\r\nX: y\r\n"))
        return [("Transfer-Encoding", "chunked")], chunks + bad
    both = [("Transfer-Encoding", "chunked"), ("Content-Length", str(len(body)))]
    return both, chunks + b"0\r\n\r\n"
