"""The gate of a study, with real keys, envelopes and a trainer that trains on phantoms."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from small_hospitals import (
    NOW,
    Hospital,
    approved,
    fixture_data,  # noqa: F401
    fixture_founded,  # noqa: F401
    fixture_site,  # noqa: F401
    phantoms,
)
from small_parties import Party

from fedseg.arrays import digest_of
from fedseg.container import Buffer
from fedseg.logs import FIELDS
from fedseg.security.keys import ReceivingKey
from fedseg.updates import open_answer, task_digest
from sites.decision import refuse
from sites.enrolment import leave
from sites.gate import Gate
from sites.standing import standing
from sites.trainer import Trainer


def test_a_study_from_enlisting_to_the_final_model(site: Hospital) -> None:
    gate = site.gate()
    said = [
        site.said(site.ask(site.task(stage, round_), gate)).body.kind
        for stage, round_ in (("enlist", 0), ("train", 1), ("evaluate", 2), ("release", 3))
    ]
    assert said == ["enlist", "train", "evaluate", "release"]
    assert site.folder.model("tiny").exists()
    assert [e.facts["stage"] for e in site.audited("answered")] == said
    assert len(site.audited("task_received")) == 4
    released = [entry.facts["digest"] for entry in site.audited("released")]
    assert released == [digest_of(site.consortium.model)]
    assert list(site.folder.spool("tiny").iterdir()) == []


def test_an_answer_is_the_one_that_the_coordinator_can_fold(site: Hospital) -> None:
    plain = site.consortium.plain("train", 1)
    answer = site.consortium.read(site.ask(site.task(plain=plain)), site.own)
    about = task_digest(plain)
    _, delta = open_answer(
        answer, site.consortium.plan, task=about, stage="train", site="hospital_a"
    )
    assert delta.keys() == site.consortium.model.keys()


def test_the_audit_names_an_answer_as_the_coordinators_does(site: Hospital) -> None:
    answer = site.ask(site.task())
    assert isinstance(answer, Path)
    (entry,) = site.audited("answered")
    assert entry.facts["digest"] == hashlib.sha256(answer.read_bytes()).hexdigest()
    assert entry.facts["bytes"] == answer.stat().st_size


def test_a_repeated_task_gets_the_same_bytes_and_trains_nothing(site: Hospital) -> None:
    envelope = site.task()
    first = site.ask(envelope)
    assert isinstance(first, Path)
    before = first.read_bytes()
    for gate in (site.gate(), site.gate()):
        again = site.ask(envelope, gate)
        assert isinstance(again, Path)
        assert again.read_bytes() == before
    assert site.trained == 1
    assert len(site.audited("answered")) == 1
    assert len(site.audited("repeated")) == 2


def test_a_lost_receiving_key_gets_the_same_answer_under_a_new_one(site: Hospital) -> None:
    first = site.consortium.read(site.ask(site.task()), site.own)
    new = ReceivingKey.generate()
    again = site.ask(site.task(reply_to=new.public))
    assert site.consortium.read(again, site.own, new) == first
    assert site.trained == 1


def test_a_second_attempt_is_worked_on_and_a_third_is_not(site: Hospital) -> None:
    gate = site.gate()
    for attempt in (1, 2):
        plain = site.consortium.plain("train", 1, attempt=attempt)
        assert site.said(site.ask(site.task(plain=plain), gate)).body.kind == "train"
    other = {name: array + 1 for name, array in site.consortium.model.items()}
    plain = site.consortium.plain("train", 1, other)
    assert site.code(site.ask(site.task(plain=plain), gate)) == "task"
    assert site.trained == 2
    assert "attempts" in str(site.audited("refused")[-1].facts["reason"])


def test_a_site_that_left_is_taken_from_the_list_and_a_new_one_waits(
    site: Hospital, data: Path
) -> None:
    consortium, other = site.consortium, Party("hospital_b").identity
    more = consortium.roll(site.own, other, version=2)
    plain = consortium.plain("enlist", 0, roll=more)
    assert site.code(site.ask(site.task(plain=plain, under=more))) == "roster"
    assert site.folder.offered_roll("tiny").exists()
    assert standing(site.folder)["studies"]["tiny"]["plan"] == "new sites wait for approval"
    assert site.said(site.ask(site.task())).body.kind == "train"  # the old list still counts
    approved(site.folder, consortium, data)
    assert not site.folder.offered_roll("tiny").exists()
    assert standing(site.folder)["studies"]["tiny"]["plan"] == "approved"
    assert site.said(site.ask(site.task(plain=plain, under=more))).body.kind == "enlist"
    assert site.code(site.ask(site.task())) == "roster"
    fewer = consortium.roll(site.own, version=3)
    plain = consortium.plain("enlist", 0, roll=fewer)
    assert site.said(site.ask(site.task(plain=plain, under=fewer))).body.kind == "enlist"
    older = consortium.plain("enlist", 0, roll=more)
    assert site.code(site.ask(site.task(plain=older, under=more))) == "roster"


def test_later_sites_need_no_approval_where_the_approval_says_so(
    site: Hospital, data: Path
) -> None:
    approved(site.folder, site.consortium, data, later=True)
    more = site.consortium.roll(site.own, Party("hospital_b").identity, version=2)
    plain = site.consortium.plain("enlist", 0, roll=more)
    assert site.said(site.ask(site.task(plain=plain, under=more))).body.kind == "enlist"
    assert site.said(site.ask(site.task(under=more))).body.kind == "train"


def test_enlisting_again_says_what_was_approved_since(site: Hospital, tmp_path: Path) -> None:
    envelope, gate = site.task("enlist", 0), site.gate()
    first = site.ask(envelope, gate)
    assert site.ask(envelope, gate) == first
    more = phantoms(tmp_path / "more", patients=4)
    approved(site.folder, site.consortium, more)
    body = site.said(site.ask(envelope, gate)).body
    assert body.kind == "enlist"
    assert body.patients["train"] == 2
    assert len(site.audited("answered")) == 2


def test_data_that_changed_since_the_approval_are_not_trained_on(
    site: Hospital, tmp_path: Path
) -> None:
    own = phantoms(tmp_path / "own")
    approved(site.folder, site.consortium, own)
    table = own / "sites.csv"
    table.write_text(table.read_text().replace(",val,", ",train,"))
    assert site.code(site.ask(site.task())) == "data"
    assert site.trained == 0
    assert "changed since" in str(site.audited("refused")[0].facts["reason"])


def test_a_policy_that_is_tightened_counts_from_the_next_task_on(site: Hospital) -> None:
    gate = site.gate()
    assert site.said(site.ask(site.task(), gate)).body.kind == "train"
    site.folder.policy.write_text("privacy_none: false\n")
    assert site.code(site.ask(site.task(round_=2), gate)) == "plan"
    site.folder.policy.write_text("privacy_none: maybe\n")
    assert site.code(site.ask(site.task(round_=2), gate)) == "data"
    site.folder.policy.write_text("privacy_none: true\nsmallest_cohort: 2\n")
    assert site.code(site.ask(site.task(round_=2), gate)) == "plan"
    assert "smallest_cohort" in str(site.audited("refused")[-1].facts["reason"])
    assert site.trained == 1


def meanwhile(gate: Gate, monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> Gate:
    """A gate whose trainer works while something happens at the hospital."""
    work = Trainer.handle

    def handle(trainer: Trainer, task: Buffer) -> bytes:
        happens()
        return work(trainer, task)

    monkeypatch.setattr(Trainer, "handle", handle)
    return gate


def test_an_approval_that_is_taken_back_during_the_work_lets_nothing_out(
    site: Hospital, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = meanwhile(
        site.gate(), monkeypatch, lambda: refuse(site.folder, "tiny", "consent", site.signing)
    )
    assert site.code(site.ask(site.task(), gate)) == "plan"
    assert site.audited("answered") == []
    assert "taken back" in str(site.audited("refused")[0].facts["reason"])
    kept = site.folder.answers("tiny").rglob("*")
    assert {path.suffix for path in kept if path.is_file()} == {".begun"}
    monkeypatch.undo()
    approved(site.folder, site.consortium, data)
    assert site.said(site.ask(site.task())).body.kind == "train"


def test_the_same_data_approved_again_during_the_work_change_nothing(
    site: Hospital, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = meanwhile(
        site.gate(), monkeypatch, lambda: approved(site.folder, site.consortium, data, later=True)
    )
    assert site.said(site.ask(site.task(), gate)).body.kind == "train"


def test_a_study_that_is_left_during_the_work_lets_nothing_out_and_leaves_nothing(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = meanwhile(site.gate(), monkeypatch, lambda: leave(site.folder, "tiny", site.signing))
    assert site.code(site.ask(site.task(), gate)) == "plan"
    assert site.audited("answered") == []
    assert list(site.folder.studies.iterdir()) == []


def test_an_answer_from_data_that_are_no_longer_approved_does_not_go_out_again(
    site: Hospital, tmp_path: Path
) -> None:
    envelope = site.task()
    first = site.consortium.read(site.ask(envelope), site.own)
    for number in (1, 2):  # the plan has two attempts: approving anew brings no third
        approved(
            site.folder, site.consortium, phantoms(tmp_path / f"{number}", patients=5 - number)
        )
        answer = site.ask(envelope)
        assert number == 2 or site.consortium.read(answer, site.own) != first
    assert site.code(answer) == "task"
    assert site.trained == 2


@pytest.mark.parametrize("place", ["handle", "_work"])
def test_what_nobody_foresaw_is_logged_without_its_text(
    place: str, site: Hospital, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = "/data/" + "jane/t1.nii.gz"  # a traceback shows lines of code, never what they make

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error", file)

    monkeypatch.setattr(Trainer, place, fails)
    assert site.code(site.ask(site.task())) == "failed"
    (said,) = [record for record in caplog.records if record.levelname == "ERROR"]
    fields = said.__dict__[FIELDS]
    assert "OSError" in fields["error"]
    assert "in fails" in fields["error"]
    assert "jane" not in f"{said.getMessage()} {fields} {said.exc_info}"
    assert "jane" not in site.folder.audit.read_text()


def test_an_expired_list_of_sites_is_refused(site: Hospital) -> None:
    site.now = NOW + timedelta(days=366)
    assert site.code(site.ask(site.task())) == "roster"
    assert "expired" in str(site.audited("refused")[0].facts["reason"])
