"""The audit: what was appended is there, in order, and nothing else."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedseg.chain import Chain, Entry, read_chain, verify_chain
from fedseg.errors import StorageError, TrustError
from fedseg.security.keys import SigningKey, load_signing_key, save_key

KEY = SigningKey.generate()
NOW = "2026-05-03T12:00:00+00:00"


def chain(folder: Path, key: SigningKey = KEY) -> Chain:
    """A log whose clock stands still."""
    return Chain(folder / "audit.jsonl", key, lambda: NOW)


def verified(folder: Path) -> list[Entry]:
    """Its entries."""
    return verify_chain(folder / "audit.jsonl", KEY.public)


def test_what_is_appended_comes_back(tmp_path: Path) -> None:
    first = chain(tmp_path).append("initialised", study="tiny")
    second = chain(tmp_path).append("refused", code="plan", round=3, sites=["a", "b"], late=None)
    assert verified(tmp_path) == read_chain(tmp_path / "audit.jsonl") == [first, second]
    assert (first.n, first.at, first.event, first.facts) == (
        1,
        NOW,
        "initialised",
        {"study": "tiny"},
    )
    assert second.prev == first.hash
    assert second.facts == {"code": "plan", "round": 3, "sites": ["a", "b"], "late": None}


def test_kinds_of_facts_stay_what_they_are(tmp_path: Path) -> None:
    facts = {"a": True, "b": 1, "c": 1.0, "d": "1", "e": "é\n\x00\ud7ff", "f": -(2**70), "event": 0}
    chain(tmp_path).append("started", **facts)
    found = verified(tmp_path)[0].facts
    assert {k: (type(v), v) for k, v in found.items()} == {
        k: (type(v), v) for k, v in facts.items()
    }


@pytest.mark.parametrize("facts", [{"a": float("nan")}, {"a": "x" * 70_000}])
def test_what_cannot_be_recorded_leaves_no_trace(tmp_path: Path, facts: dict[str, float]) -> None:
    chain(tmp_path).append("started")
    with pytest.raises(ValueError):
        chain(tmp_path).append("started", **facts)
    assert len(verified(tmp_path)) == 1


def test_an_event_is_a_word(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="event"):
        chain(tmp_path).append("Two words")


def test_the_files_are_for_their_owner(tmp_path: Path) -> None:
    chain(tmp_path).append("started")
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "audit.jsonl": 0o600,
        "audit.head": 0o600,
    }


def test_a_log_ahead_of_its_head_is_what_a_crash_leaves(tmp_path: Path) -> None:
    chain(tmp_path).append("started")
    head = (tmp_path / "audit.head").read_bytes()
    chain(tmp_path).append("answered")
    (tmp_path / "audit.head").write_bytes(head)
    assert [entry.event for entry in verified(tmp_path)] == ["started", "answered"]
    chain(tmp_path).append("stopped")
    assert [entry.event for entry in verified(tmp_path)] == ["started", "answered", "stopped"]
    assert json.loads((tmp_path / "audit.head").read_bytes())["n"] == 3


def test_a_torn_line_is_cut_and_recorded(tmp_path: Path) -> None:
    chain(tmp_path).append("started")
    with (tmp_path / "audit.jsonl").open("ab") as log:
        log.write(b'{"at":"2026')
    assert [entry.event for entry in verified(tmp_path)] == ["started"]
    chain(tmp_path).append("stopped")
    found = verified(tmp_path)
    assert [entry.event for entry in found] == ["started", "torn_line", "stopped"]
    assert found[1].facts == {"bytes": 11}


def test_a_crash_at_the_very_first_entry_is_mended(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").write_bytes(b'{"at')
    chain(tmp_path).append("initialised")
    assert [entry.event for entry in verified(tmp_path)] == ["torn_line", "initialised"]


def test_nothing_is_appended_to_a_log_without_its_tail(tmp_path: Path) -> None:
    for event in ("started", "answered"):
        chain(tmp_path).append(event)
    path = tmp_path / "audit.jsonl"
    whole = path.read_bytes()
    first, _ = whole.splitlines(keepends=True)
    for cut in (first, b"", first + b'{"torn', whole[:-1]):
        path.write_bytes(cut)
        with pytest.raises(TrustError, match="the tail is missing"):
            chain(tmp_path).append("stopped")
        assert path.read_bytes() == cut
        with pytest.raises(TrustError, match="the tail is missing"):
            verified(tmp_path)


def test_a_missing_log_or_head_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="head"):
        verified(tmp_path)
    with pytest.raises(TrustError, match="cannot read"):
        read_chain(tmp_path / "audit.jsonl")
    chain(tmp_path).append("started")
    (tmp_path / "audit.head").unlink()
    for act in (lambda: verified(tmp_path), lambda: chain(tmp_path).append("stopped")):
        with pytest.raises(TrustError, match="head"):
            act()


def test_another_key_is_noticed(tmp_path: Path) -> None:
    chain(tmp_path).append("started")
    other = SigningKey.generate()
    with pytest.raises(TrustError):
        verify_chain(tmp_path / "audit.jsonl", other.public)
    with pytest.raises(TrustError):
        chain(tmp_path, other).append("stopped")
    assert len(verified(tmp_path)) == 1


def test_a_full_disk_is_an_error_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(tmp_path).append("started")
    real = os.write

    def filling(file: int, data: bytes) -> int:
        """Room for ten bytes more."""
        if len(data) <= 10:
            raise OSError(28, "No space left on device")
        return real(file, data[:-10])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", filling)
        with pytest.raises(StorageError, match="No space left"):
            chain(tmp_path).append("answered")
    assert [entry.event for entry in verified(tmp_path)] == ["started"]
    chain(tmp_path).append("stopped")
    assert [entry.event for entry in verified(tmp_path)] == ["started", "stopped"]


SCRIPT = """
import sys
import threading
from pathlib import Path
from fedseg.chain import Chain
from fedseg.security.keys import load_signing_key
folder, name = Path(sys.argv[1]), sys.argv[2]
log = Chain(folder / "audit.jsonl", load_signing_key(folder / "a.key"), lambda: "now")
for number in range(20):
    log.append("answered", site=name, round=number)
"""


def test_several_processes_append_in_turn(tmp_path: Path) -> None:
    save_key(tmp_path / "a.key", KEY)
    assert load_signing_key(tmp_path / "a.key").public == KEY.public
    started = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), name]) for name in "ab"
    ]
    assert [process.wait(60) for process in started] == [0, 0]
    found = verified(tmp_path)
    assert [entry.n for entry in found] == list(range(1, 41))
    for name in "ab":
        own = [entry.facts["round"] for entry in found if entry.facts["site"] == name]
        assert own == list(range(20))


def test_two_logs_of_one_process_append_in_turn_while_others_read(tmp_path: Path) -> None:
    """The trainer has the audit open twice: as its chronicle, and as the ledger's witness."""
    chain(tmp_path).append("started")
    own = [chain(tmp_path), chain(tmp_path)]

    def write(log: Chain, name: str) -> None:
        for number in range(25):
            log.append("answered", site=name, round=number, reason="x" * 3000)

    writers = [threading.Thread(target=write, args=pair) for pair in zip(own, "ab", strict=True)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        found = verified(tmp_path)
        assert len(found) >= seen
        seen = len(found)
    assert [entry.n for entry in verified(tmp_path)] == list(range(1, 52))


def test_a_line_that_is_being_written_is_not_read_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that meets half a line must not take what comes next for a line of its own."""
    chain(tmp_path).append("started")
    chain(tmp_path).append("stopped")
    whole = (tmp_path / "audit.jsonl").read_bytes()
    first, second = whole.splitlines(keepends=True)

    class Growing(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            return parts.pop(0) if parts else b""

    parts = [first, second[:40], second[40:]]
    monkeypatch.setattr(Path, "open", lambda *_: Growing())
    assert [entry.event for entry in read_chain(tmp_path / "audit.jsonl")] == ["started"]
