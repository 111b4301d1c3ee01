"""Nobody without the key changes an audit unseen; a crash at any byte loses no whole entry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedseg.chain import Chain, read_chain, verify_chain
from fedseg.errors import TrustError
from fedseg.security.keys import SigningKey

KEY = SigningKey.generate()
ENTRIES = 5


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A place for logs."""
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def good(folder: Path) -> tuple[bytes, bytes, bytes]:
    """A log, its head, and the head one entry before."""
    path = folder / "good.jsonl"
    before = b""
    for number in range(ENTRIES):
        if number:
            before = (folder / "good.head").read_bytes()
        Chain(path, KEY, lambda: "now").append("answered", round=number, site="hospital_a")
    return path.read_bytes(), (folder / "good.head").read_bytes(), before


def verdict(folder: Path, log: bytes, head: bytes) -> int:
    """How many entries stand."""
    (folder / "try.jsonl").write_bytes(log)
    (folder / "try.head").write_bytes(head)
    return len(verify_chain(folder / "try.jsonl", KEY.public))


Good = tuple[bytes, bytes, bytes]


def test_every_byte_of_log_and_head_counts(folder: Path, good: Good) -> None:
    log, head, _ = good
    assert verdict(folder, log, head) == ENTRIES
    for at in range(0, len(log), 3):
        with pytest.raises(TrustError):
            verdict(folder, log[:at] + bytes([log[at] ^ 1]) + log[at + 1 :], head)
    for at in range(len(head) - 1):
        with pytest.raises(TrustError):
            verdict(folder, log, head[:at] + bytes([head[at] ^ 1]) + head[at + 1 :])


@given(at=st.integers(0), change=st.integers(1, 255))
@settings(max_examples=200)
def test_any_edit_shows(folder: Path, good: Good, at: int, change: int) -> None:
    log = bytearray(good[0])
    log[at % len(log)] ^= change
    with pytest.raises(TrustError):
        verdict(folder, bytes(log), good[1])


@given(end=st.integers(0))
def test_any_cut_shows(folder: Path, good: Good, end: int) -> None:
    with pytest.raises(TrustError, match="tail is missing"):
        verdict(folder, good[0][: end % len(good[0])], good[1])


@given(order=st.lists(st.integers(0, ENTRIES - 1), max_size=ENTRIES + 2))
@settings(max_examples=200)
def test_lines_removed_repeated_or_reordered_show(
    folder: Path, good: Good, order: list[int]
) -> None:
    assume(order != list(range(ENTRIES)))
    lines = good[0].splitlines(keepends=True)
    with pytest.raises(TrustError, match=r"entry|tail"):
        verdict(folder, b"".join(lines[number] for number in order), good[1])


def test_the_first_bad_entry_is_named(folder: Path, good: Good) -> None:
    lines = good[0].splitlines(keepends=True)
    edited = [*lines]
    edited[2] = lines[2].replace(b"hospital_a", b"hospital_b")
    with pytest.raises(TrustError, match="entry 3 of the audit was edited"):
        verdict(folder, b"".join(edited), good[1])
    with pytest.raises(TrustError, match="line 3 of the audit is entry 4"):
        verdict(folder, b"".join(lines[:2] + lines[3:]), good[1])
    with pytest.raises(TrustError, match="line 2 of the audit is entry 3"):
        verdict(folder, b"".join([lines[0], lines[2], lines[1], *lines[3:]]), good[1])


def test_nobody_without_the_key_adds_an_entry(folder: Path, good: Good) -> None:
    """Not even where a crash would leave one, after the head."""
    (folder / "try.jsonl").write_bytes(good[0])
    last = read_chain(folder / "try.jsonl")[-1]
    for key, stands in ((KEY, True), (SigningKey.generate(), False)):
        entry = Chain(folder / "unused.jsonl", key, lambda: "now")._entry(last, "approved", {})
        log = good[0] + entry.canonical_bytes + b"\n"
        if stands:
            assert verdict(folder, log, good[1]) == ENTRIES + 1
        else:
            with pytest.raises(TrustError, match=r"entry 6 of the audit .* not by this key"):
                verdict(folder, log, good[1])


def test_an_entry_of_another_log_of_the_same_key_does_not_fit(folder: Path, good: Good) -> None:
    path = folder / "second.jsonl"
    for number in range(ENTRIES):
        Chain(path, KEY, lambda: "later").append("answered", round=number, site="hospital_a")
    mine = good[0].splitlines(keepends=True)
    theirs = path.read_bytes().splitlines(keepends=True)
    for at in range(ENTRIES):
        with pytest.raises(TrustError):
            verdict(folder, b"".join([*mine[:at], theirs[at], *mine[at + 1 :]]), good[1])
    with pytest.raises(TrustError, match="is not the one that the head names"):
        verdict(folder, b"".join(theirs), good[1])


@given(end=st.integers(0))
@settings(max_examples=60)
def test_a_crash_at_any_byte_of_an_append_is_mended(folder: Path, good: Good, end: int) -> None:
    """The log is cut anywhere in its last line, the head is still the one before."""
    log, _, before = good
    start = log[:-1].rfind(b"\n") + 1
    cut = start + end % (len(log) - start + 1)
    whole = ENTRIES if cut == len(log) else ENTRIES - 1
    assert verdict(folder, log[:cut], before) == whole
    torn = start < cut < len(log)
    entry = Chain(folder / "try.jsonl", KEY, lambda: "now").append("restored")
    found = verify_chain(folder / "try.jsonl", KEY.public)
    assert found[-1] == entry
    assert len(found) == whole + 1 + torn
    assert [e.event for e in found].count("torn_line") == torn
