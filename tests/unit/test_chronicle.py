"""What comes from outside is audited, and cannot fill the audit or hide anything in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedseg.chain import Chain, Entry, read_chain
from fedseg.security.keys import SigningKey
from sites import chronicle as module
from sites.chronicle import HOUR_S, Chronicle

NOW = "2026-05-03T12:00:00+00:00"


class Watch:
    """A chronicle under a clock of its own."""

    def __init__(self, path: Path) -> None:
        self.time, self._path = 0.0, path
        chain = Chain(path, SigningKey.generate(), lambda: NOW)
        self.chronicle = Chronicle(chain, clock=lambda: self.time)

    @property
    def entries(self) -> list[Entry]:
        return read_chain(self._path)


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(module, "SINGLY", 3)
    return Watch(tmp_path / "audit.jsonl")


def test_many_of_one_kind_become_a_number_in_the_next_hour(watch: Watch) -> None:
    for _ in range(10):
        watch.chronicle.provoked("refused", study="lung", code="stranger", reason="odd")
    assert len(watch.entries) == 3
    watch.time = HOUR_S + 1
    watch.chronicle.provoked("refused", study="lung", code="stranger", reason="odd")
    facts = [entry.facts for entry in watch.entries[3:]]
    of = {"study": "lung", "code": "stranger"}
    assert facts == [{**of, "reason": "7 more within one hour"}, {**of, "reason": "odd"}]


def test_rubbish_hides_neither_another_code_nor_another_study(watch: Watch) -> None:
    for _ in range(10):
        watch.chronicle.provoked("refused", code="stranger", reason="odd")
        watch.chronicle.provoked("refused", study="lung", code="stranger", reason="odd")
    watch.chronicle.provoked("refused", study="lung", code="task", reason="a third model")
    watch.chronicle.provoked("refused", study="head", code="stranger", reason="odd")
    said = [(e.facts.get("study"), e.facts["code"]) for e in watch.entries[6:]]
    assert said == [("lung", "task"), ("head", "stranger")]


def test_what_leaves_is_always_an_entry_and_the_rest_is_settled_at_the_end(watch: Watch) -> None:
    for _ in range(5):
        watch.chronicle.write("answered", study="lung")
        watch.chronicle.provoked("repeated", study="lung", round=1)
    watch.chronicle.close()
    assert [e.event for e in watch.entries].count("answered") == 5
    assert watch.entries[-1].facts == {"study": "lung", "reason": "2 more within one hour"}
