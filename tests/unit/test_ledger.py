"""The ledger: a debit outlives everything, nobody overspends, and whatever is changed shows."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from small_ledgers import (
    KEY,
    LIMITS,
    SCORE,
    SECRET,
    STEP,
    created,
    digest,
    now,
    patient,
    place,
    registered,
    reopened,
    study,
    witness,
)

from fedseg.chain import Chain, verify_chain
from fedseg.errors import DataError, PrivacyError, StorageError, TrustError
from fedseg.privacy.accounting import PrivacyFilter, epsilon_spent
from fedseg.privacy.guarantee import rounded_up
from fedseg.privacy.ledger import Ledger, figures, patient_key
from fedseg.privacy.ledger.entries import next_row
from fedseg.privacy.ledger.file import insert
from fedseg.privacy.ledger.restore import restore
from fedseg.privacy.ledger.views import budget, export, show, withdrawal
from fedseg.privacy.mechanisms import Mechanism


def spent(ledger: Ledger, number: int) -> float:
    """At the ledger's order."""
    rule = PrivacyFilter(LIMITS.total_epsilon, LIMITS.total_delta, ledger.refresh().order)
    return rule.cost(ledger.book.charges(patient(number)))


def edited(folder: Path, *statements: str) -> None:
    """Change the file as somebody would who means harm."""
    with closing(sqlite3.connect(place(folder), isolation_level=None)) as database:
        database.executescript("DROP TRIGGER no_update; DROP TRIGGER no_delete;")
        for statement in statements:
            database.execute(statement)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """With one study, nothing spent."""
    found = created(tmp_path)
    registered(found, study())
    return found


def test_a_debit_is_there_before_work_and_after_a_restart(ledger: Ledger, tmp_path: Path) -> None:
    taken = ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    assert (taken.attempt, taken.answer) == (1, None)
    again = reopened(tmp_path)
    assert again.book.charges(patient(3)) == (STEP,)
    assert again.book.charges(patient(11)) == again.book.charges(patient(99)) == ()
    assert again.verify() == []


def test_a_retry_costs_nothing_and_an_answered_task_gives_its_answer(ledger: Ledger) -> None:
    first = ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    second = ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    assert (second.attempt, second.answer) == (2, None)
    ledger.commit(first.task, digest("sealed"))
    ledger.commit(first.task, digest("sealed"))
    rows = len(ledger.rows)
    third = ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    assert third.answer == digest("sealed") and len(ledger.rows) == rows
    assert ledger.book.charges(patient(0)) == (STEP,)


def test_a_reservation_has_one_answer(ledger: Ledger) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    ledger.commit(digest("1"), digest("sealed"))
    with pytest.raises(PrivacyError, match="another answer"):
        ledger.commit(digest("1"), digest("sealed anew"))
    with pytest.raises(PrivacyError, match="without a debit"):
        ledger.commit(digest("2"), digest("sealed"))


@pytest.mark.parametrize(
    ("use", "mechanism"),
    [
        ("train", STEP.model_copy(update={"noise_multiplier": 9.9})),
        ("train", STEP.model_copy(update={"rate": 0.5})),
        ("train", STEP.model_copy(update={"steps": 21})),
        ("train", STEP.model_copy(update={"noise": "shared"})),
        ("val", STEP),
    ],
)
def test_only_what_was_approved_is_paid_for(ledger: Ledger, use: str, mechanism: Mechanism) -> None:
    with pytest.raises(PrivacyError, match="schedule"):
        ledger.reserve(digest("1"), "liver", use, mechanism, LIMITS)  # type: ignore[arg-type]
    assert spent(ledger, 0) == 0


def test_a_task_cannot_be_reserved_for_other_work(ledger: Ledger) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    with pytest.raises(PrivacyError, match="other work"):
        ledger.reserve(digest("1"), "liver", "val", SCORE, LIMITS)


def test_the_schedule_ends(ledger: Ledger) -> None:
    for task in "1234":
        ledger.reserve(digest(task), "liver", "train", STEP, LIMITS)
    with pytest.raises(PrivacyError, match="5 more steps"):
        ledger.reserve(digest("5"), "liver", "train", STEP, LIMITS)
    ledger.reserve(digest("v"), "liver", "val", SCORE, LIMITS)


def test_a_study_that_nobody_registered_or_that_is_over_gets_nothing(ledger: Ledger) -> None:
    with pytest.raises(PrivacyError, match="not registered"):
        ledger.reserve(digest("1"), "brain", "train", STEP, LIMITS)
    ledger.close("liver", "left")
    with pytest.raises(PrivacyError, match="closed"):
        ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)


def test_a_register_is_frozen_once_anybody_was_charged(ledger: Ledger) -> None:
    registered(ledger, study(train=range(9)))
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    registered(ledger, study(train=range(9)))
    with pytest.raises(PrivacyError, match="frozen"):
        registered(ledger, study(train=range(8)))


def test_a_closed_study_opens_again_with_what_it_has_left(ledger: Ledger) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    ledger.close("liver", "refused")
    with pytest.raises(PrivacyError, match="frozen"):
        registered(ledger, study(train=range(9)))
    ledger.withdraw(patient(3), "asked for it")
    registered(ledger, study())
    assert ledger.book.studies["liver"].closed is None
    assert ledger.book.left("liver")[0].mechanism.steps == 15
    for task in "234":
        ledger.reserve(digest(task), "liver", "train", STEP, LIMITS)
    with pytest.raises(PrivacyError, match="schedule"):
        ledger.reserve(digest("5"), "liver", "train", STEP, LIMITS)


def test_a_closed_study_takes_back_its_place_only_where_there_is_room(ledger: Ledger) -> None:
    tight = replace(LIMITS, total_epsilon=LIMITS.study_epsilon)
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    ledger.close("liver", "refused")
    registered(ledger, study("brain"), tight)
    for task in "234":
        ledger.reserve(digest(task), "brain", "train", STEP, LIMITS)
    with pytest.raises(PrivacyError, match=r"too little.*total_epsilon"):
        registered(ledger, study(), replace(LIMITS, total_epsilon=4.0))


def test_a_closed_study_that_was_never_charged_may_have_another_register(ledger: Ledger) -> None:
    ledger.close("liver", "refused")
    registered(ledger, study(train=range(9)))
    assert len(ledger.book.studies["liver"].train) == 9


def test_a_promise_that_the_schedule_does_not_keep_is_refused(ledger: Ledger) -> None:
    event = study("brain")
    work = [each.mechanism for each in event.schedule if each.use == "train"]
    cost = epsilon_spent(work, 1e-5)
    ledger.register(event, LIMITS, epsilon=cost * 1.001, delta=1e-5)
    with pytest.raises(PrivacyError, match="noise is too weak"):
        ledger.register(study("lung"), LIMITS, epsilon=cost * 0.999, delta=1e-5)


def test_the_policy_bounds_a_study(ledger: Ledger) -> None:
    with pytest.raises(PrivacyError, match="policy allows"):
        ledger.register(study("brain"), LIMITS, epsilon=8.1, delta=1e-5)
    with pytest.raises(PrivacyError, match="policy allows"):
        ledger.register(study("brain"), LIMITS, epsilon=8, delta=1e-4)
    wide = replace(LIMITS, study_delta=0.5)
    with pytest.raises(PrivacyError, match="patients"):
        ledger.register(study("brain"), wide, epsilon=8, delta=0.1)


def test_a_second_study_counts_what_the_first_may_still_take(tmp_path: Path) -> None:
    tight = replace(LIMITS, total_epsilon=2.7)
    ledger = created(tmp_path, tight)
    registered(ledger, study("one"), tight)
    with pytest.raises(PrivacyError, match="10 of the 14 patients"):
        registered(ledger, study("two"), tight)
    registered(ledger, study("others", range(20, 30), range(30, 33)), tight)
    ledger.close("one", "the consortium gave up")
    registered(ledger, study("two"), tight)


def test_the_filter_stops_even_within_the_schedule(ledger: Ledger) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    tightened = replace(LIMITS, total_epsilon=1.5)
    with pytest.raises(PrivacyError, match="10 patients have no budget left"):
        ledger.reserve(digest("2"), "liver", "train", STEP, tightened)
    assert ledger.reserve(digest("1"), "liver", "train", STEP, tightened).attempt == 2


def test_another_name_or_use_resets_nothing(ledger: Ledger) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    before = spent(ledger, 0)
    registered(ledger, study("renamed", range(5, 12), range(5)))
    assert spent(ledger, 0) == before
    ledger.reserve(digest("v"), "renamed", "val", SCORE, LIMITS)
    assert spent(ledger, 0) > before and spent(ledger, 5) == before


def test_who_moves_splits_or_merges_carries_all_of_it(ledger: Ledger) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    ledger.reserve(digest("v"), "liver", "val", SCORE, LIMITS)
    trained, scored = spent(ledger, 0), spent(ledger, 10)
    ledger.link((patient(0),), (patient(50), patient(51)), "two people under one number")
    assert spent(ledger, 50) == spent(ledger, 51) == trained
    ledger.link((patient(1), patient(10)), (patient(10),), "one person under two numbers")
    assert spent(ledger, 10) == pytest.approx(trained + scored)
    ledger.link((patient(10),), (patient(60),), "moved")
    assert spent(ledger, 60) == pytest.approx(trained + scored)
    ledger.reserve(digest("2"), "liver", "train", STEP, LIMITS)  # under the frozen register
    assert spent(ledger, 60) == pytest.approx(2 * trained + scored)


def test_one_person_twice_in_a_cohort_is_charged_as_such(ledger: Ledger) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    once = spent(ledger, 0)
    ledger.link((patient(0), patient(1)), (patient(70),), "the same person")
    assert ledger.refresh().charges(patient(70)) == (STEP.of_records(2),)
    assert spent(ledger, 70) == pytest.approx(4 * once)


def test_an_heir_s_budget_stops_the_old_register(ledger: Ledger) -> None:
    """The person behind two ids has spent more than either id: the person's sum decides."""
    ledger.link((patient(0), patient(1)), (patient(70),), "the same person")
    tight = replace(LIMITS, total_epsilon=3.0)
    with pytest.raises(PrivacyError, match="1 patients have no budget"):
        ledger.reserve(digest("1"), "liver", "train", STEP, tight)


def test_old_ids_and_withdrawn_patients_are_not_registered_again(ledger: Ledger) -> None:
    ledger.link((patient(0),), (patient(50),), "moved")
    with pytest.raises(DataError, match="another id"):
        registered(ledger, study("brain"))
    ledger.withdraw(patient(50), "asked by letter")
    with pytest.raises(DataError, match="withdrawn"):
        registered(ledger, study("brain", range(50, 60)))
    with pytest.raises(DataError, match="each patient once"):
        registered(ledger, study("brain", range(20, 30), range(29, 32)))


def test_withdrawal_lists_what_the_data_went_into(ledger: Ledger) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    ledger.commit(digest("1"), digest("sealed"))
    ledger.reserve(digest("v"), "liver", "val", SCORE, LIMITS)
    debits = ledger.withdraw(patient(3), "asked by letter")
    assert [each.reservation for each in debits] == [digest("1")]
    text = withdrawal(debits)
    assert "liver" in text and "training" in text and digest("sealed")[:12] in text
    assert "nothing that could leave" in withdrawal(ledger.withdraw(patient(77), "never seen"))
    assert ledger.book.has_withdrawn(patient(3)) and spent(ledger, 3) > 0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE rows SET event = replace(event, '10.0', '99.0') WHERE n = 3",
        "UPDATE rows SET at = '2020' WHERE n = 2",
        "DELETE FROM rows WHERE n = 2",
        "DELETE FROM rows WHERE n = 1",
        "UPDATE rows SET n = n + 10 WHERE n = 4",
        "DELETE FROM rows WHERE n = 4",
        "DELETE FROM rows",
    ],
)
def test_whatever_is_changed_shows(ledger: Ledger, tmp_path: Path, statement: str) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    ledger.commit(digest("1"), digest("sealed"))
    edited(tmp_path, statement)
    with pytest.raises(TrustError):
        reopened(tmp_path)


def test_a_row_that_is_chained_anew_shows_against_the_audit(ledger: Ledger, tmp_path: Path) -> None:
    """Whoever can compute hashes can forge a chain, but not the audit's signatures."""
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    forged = tmp_path / "forged"
    forged.mkdir()
    cheap = created(forged)
    registered(cheap, study())
    cheap.reserve(digest("1"), "liver", "val", SCORE, LIMITS)
    shutil.copy(place(forged), place(tmp_path))
    with pytest.raises(TrustError, match="row 3 of the ledger is not what the audit has seen"):
        reopened(tmp_path)


def test_a_rollback_of_the_ledger_alone_shows(ledger: Ledger, tmp_path: Path) -> None:
    old = shutil.copy(place(tmp_path), tmp_path / "old")
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    shutil.copy(old, place(tmp_path))
    with pytest.raises(TrustError, match="rolled back"):
        reopened(tmp_path)
    with pytest.raises(TrustError, match="while it was in use"):
        ledger.reserve(digest("2"), "liver", "train", STEP, LIMITS)


def test_a_ledger_that_is_gone_is_not_begun_anew(ledger: Ledger, tmp_path: Path) -> None:
    place(tmp_path).unlink()
    with pytest.raises(TrustError, match="missing"):
        reopened(tmp_path)
    with pytest.raises(TrustError, match="forget what was spent"):
        created(tmp_path)


def test_another_secret_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="another secret"):
        Ledger.open(place(tmp_path), b"t" * 32, witness(tmp_path), now)
    with pytest.raises(ValueError):
        patient_key(b"short", "1")
    assert patient_key(SECRET, " 7 ") == patient_key(SECRET, "7") != patient_key(b"t" * 32, "7")


def test_rows_that_a_crash_kept_from_the_audit_are_entered_later(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Chain, "append", crash)
        with pytest.raises(KeyboardInterrupt):
            ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    assert [row.n for row in ledger.verify()] == [3]
    assert reopened(tmp_path).verify() == []
    assert spent(reopened(tmp_path), 0) > 0


def test_nothing_goes_on_while_the_audit_cannot_be_written(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageError("no room")

    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    with monkeypatch.context() as patch:
        patch.setattr(Chain, "append", full)
        for _ in range(2):
            with pytest.raises(StorageError):
                ledger.commit(digest("1"), digest("sealed"))
    assert len(ledger.verify()) == 1
    ledger.commit(digest("1"), digest("sealed"))
    assert ledger.verify() == []


def test_a_write_that_was_cut_short_leaves_nothing_behind(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(database: sqlite3.Connection, row: object) -> None:
        insert(database, row)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedseg.privacy.ledger.store.insert", cut)
        with pytest.raises(KeyboardInterrupt):
            ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    assert len(ledger.refresh().debits) == 0
    assert ledger.reserve(digest("2"), "liver", "train", STEP, LIMITS).attempt == 1
    assert reopened(tmp_path).verify() == [] and len(ledger.book.debits) == 1


def test_a_retry_tells_the_audit_what_it_is_about(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first entry was lost and the ledger with it, the debit still comes back."""
    backup = Path(shutil.copy(place(tmp_path), tmp_path / "backup"))
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    seen = [each.event for each in witness(tmp_path).seen()]
    assert seen[2] == seen[3] is not None
    shutil.copy(backup, place(tmp_path))
    assert restored(tmp_path)[1] == 1


def test_the_file_refuses_to_change_rows(ledger: Ledger, tmp_path: Path) -> None:
    with closing(sqlite3.connect(place(tmp_path))) as database:
        with pytest.raises(sqlite3.IntegrityError, match="never changed"):
            database.execute("UPDATE rows SET at = ''")
        with pytest.raises(sqlite3.IntegrityError, match="never removed"):
            database.execute("DELETE FROM rows")


def test_what_cannot_be_written_is_an_error_of_storage(ledger: Ledger, tmp_path: Path) -> None:
    with closing(sqlite3.connect(place(tmp_path), isolation_level=None)) as database:
        database.execute(
            "CREATE TRIGGER full BEFORE INSERT ON rows BEGIN SELECT RAISE(ABORT, 'x'); END"
        )
    with pytest.raises(StorageError, match="unrecorded"):
        ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    assert spent(ledger, 0) == 0


def test_a_damaged_file_is_said_to_be(ledger: Ledger, tmp_path: Path) -> None:
    place(tmp_path).write_bytes(b"no database at all" * 100)
    with pytest.raises(TrustError, match="damaged"):
        reopened(tmp_path)


def restored(folder: Path, *backups: Path) -> tuple[Ledger, int]:
    return restore(
        place(folder), backups, SECRET, witness(folder), now, limits=LIMITS, reason="disk died"
    )


def test_an_old_backup_gets_back_what_the_audit_has_seen(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    backup = Path(shutil.copy(place(tmp_path), tmp_path / "backup"))
    ledger.reserve(digest("2"), "liver", "train", STEP, LIMITS)
    ledger.commit(digest("2"), digest("sealed"))
    before = spent(ledger, 0)
    place(tmp_path).write_bytes(b"gone")
    back, recovered = restored(tmp_path, backup)
    assert recovered == 1 and spent(back, 0) == before
    assert back.reserve(digest("2"), "liver", "train", STEP, LIMITS).answer == digest("sealed")
    events = [e.event for e in verify_chain(tmp_path / "audit.jsonl", KEY.public)]
    assert "ledger_restored" in events
    assert reopened(tmp_path).verify() == []
    shutil.copy(backup, place(tmp_path))
    with pytest.raises(TrustError):
        reopened(tmp_path)


def test_without_any_backup_everyone_pays(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    before = spent(ledger, 0)
    place(tmp_path).unlink()
    back, recovered = restored(tmp_path)
    assert recovered == 1
    assert spent(back, 0) == spent(back, 11) == spent(back, 999) == before
    assert "lost registers" in show(back.book, LIMITS)


def test_two_branches_are_both_paid_for(ledger: Ledger, tmp_path: Path) -> None:
    """A copy that somebody worked with elsewhere: all that either did counts, twice if need be."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(place(tmp_path), place(other))
    shutil.copy(tmp_path / "audit.jsonl", other / "audit.jsonl")
    shutil.copy(tmp_path / "audit.head", other / "audit.head")
    astray = reopened(other)
    for each, answer in ((ledger, "a"), (astray, "b")):
        each.reserve(digest("1"), "liver", "train", STEP, LIMITS)
        each.commit(digest("1"), digest(answer))
    astray.reserve(digest("2"), "liver", "train", STEP, LIMITS)
    astray.withdraw(patient(4), "there")
    one = spent(ledger, 0)
    back, recovered = restored(tmp_path, place(other))
    assert recovered == 2 and spent(back, 0) == pytest.approx(3 * one)
    assert back.book.has_withdrawn(patient(4))
    again, recovered = restored(tmp_path, place(other))
    assert recovered == 0 and spent(again, 0) == pytest.approx(3 * one)


def test_a_rollback_of_everything_shows_to_who_remembers_a_head(
    ledger: Ledger, tmp_path: Path
) -> None:
    names = ("ledger.sqlite", "audit.jsonl", "audit.head")
    old = {name: (tmp_path / name).read_bytes() for name in names}
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    head = ledger.blinded_head("liver")
    ledger.acknowledge("liver", head)
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    back = reopened(tmp_path)
    with pytest.raises(TrustError, match="put back"):
        back.acknowledge("liver", head)
    assert head != back.blinded_head("brain") != back.blinded_head("liver")


def test_the_views_say_what_was_spent_in_words(ledger: Ledger) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    text = show(ledger.book, LIMITS)
    cost = epsilon_spent([STEP], 1e-5)
    assert "liver: open" in text and "10 patients" in text and "1 debits without" in text
    assert f"{cost:.2f}"[:3] in text and "delta 1e-05" in text and "######" in text
    left = budget(ledger.book, LIMITS)
    assert "epsilon 10 at delta 1e-05" in left and "% of the budget" in left
    assert "Open studies" in left and "4 patients" in left
    rows = export(ledger.rows)
    assert len(rows) == 3 and "epsilon" not in str(rows)


def test_the_views_of_an_empty_ledger(tmp_path: Path) -> None:
    assert "No patient" in budget(created(tmp_path).book, LIMITS)


def test_where_the_audit_went_back_too_open_studies_are_charged_to_their_end(
    ledger: Ledger, tmp_path: Path
) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    found, recovered = restore(
        place(tmp_path), [], SECRET, witness(tmp_path), now, limits=LIMITS, reason="disk",
        to_the_end=True,
    )  # fmt: skip
    assert recovered == 2 and found.book.studies["liver"].closed == "disk"
    assert sum(m.steps for m in found.book.charges(patient(0))) == 20
    assert found.book.charges(patient(11)) == (SCORE.model_copy(update={"steps": 2}),)
    registered(found, study())
    with pytest.raises(PrivacyError, match="schedule"):
        found.reserve(digest("2"), "liver", "train", STEP, LIMITS)
    place(tmp_path).unlink()  # and the audit knows of these debits by itself from now on
    again, recovered = restore(
        place(tmp_path), [], SECRET, witness(tmp_path), now, limits=LIMITS, reason="lost"
    )
    assert recovered == 3
    assert sum(m.steps for m in again.book.charges(patient(0))) == 22, "everyone, either use"


def test_a_register_that_a_backup_does_not_know_charges_everyone_and_ends_the_study(
    ledger: Ledger, tmp_path: Path
) -> None:
    """The backup holds the study's first register; patients were charged under the second."""
    backup = Path(shutil.copy(place(tmp_path), tmp_path / "backup"))
    registered(ledger, study(train=range(5, 10)))
    registered(ledger, study(train=range(30, 40)))
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    before = spent(ledger, 35)
    place(tmp_path).unlink()
    back, recovered = restored(tmp_path, backup)
    assert recovered == 1 and spent(back, 35) == before > 0
    with pytest.raises(PrivacyError, match="closed"):
        back.reserve(digest("2"), "liver", "train", STEP, LIMITS)
    place(tmp_path).unlink()
    assert spent(restored(tmp_path, backup)[0], 35) == before, "nor does the next backup forget"


def test_links_and_withdrawals_come_back_from_the_audit(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    backup = Path(shutil.copy(place(tmp_path), tmp_path / "backup"))
    ledger.link((patient(0), patient(1)), (patient(70),), "the same person")
    ledger.withdraw(patient(3), "asked by letter")
    ledger.close("liver", "over")
    before = spent(ledger, 70)
    shutil.copy(backup, place(tmp_path))
    back, recovered = restored(tmp_path)
    assert recovered == 0 and spent(back, 70) == before > 0
    assert back.book.has_withdrawn(patient(3)) and back.book.studies["liver"].closed == "over"


def test_a_head_that_a_declared_restore_lost_is_still_known(ledger: Ledger, tmp_path: Path) -> None:
    """Else a study could never go on after a disk died at one of its hospitals."""
    backup = Path(shutil.copy(place(tmp_path), tmp_path / "backup"))
    ledger.reserve(digest("1"), "liver", "train", STEP, LIMITS)
    head = ledger.blinded_head("liver")
    shutil.copy(backup, place(tmp_path))
    back, _ = restored(tmp_path)
    back.acknowledge("liver", head)
    with pytest.raises(TrustError, match="put back"):
        back.acknowledge("liver", digest("nobody's"))


def test_threads_read_what_others_wrote_once(ledger: Ledger, tmp_path: Path) -> None:
    other = reopened(tmp_path)
    for number in range(20):
        other.withdraw(patient(100 + number), "asked by letter")
    heads: list[str] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        heads.append(ledger.blinded_head("liver"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heads == [other.blinded_head("liver")] * 8
    assert [row.n for row in ledger.rows] == list(range(1, 23))


def test_a_person_with_records_in_both_uses_must_have_room_for_both(tmp_path: Path) -> None:
    tight = replace(LIMITS, total_epsilon=2.7)
    ledger = created(tmp_path, tight)
    registered(ledger, study("one", range(20, 30), range(30, 33)), tight)  # fits for anyone once
    ledger.link((patient(90),), (patient(0), patient(1)), "one number, perhaps one person")
    ledger.link((patient(0),), (patient(0), patient(1)), "and so it was")
    with pytest.raises(PrivacyError, match="1 of the 14 patients"):
        registered(ledger, study("two"), tight)


def test_what_a_person_with_two_records_was_charged_is_shown(ledger: Ledger) -> None:
    registered(ledger, study("kidney"))
    ledger.reserve(digest("r"), "kidney", "train", STEP, LIMITS)
    assert "another id" not in show(ledger.book, LIMITS)
    ledger.link((patient(0),), (patient(0), patient(1)), "one person, two numbers")
    worst = epsilon_spent([STEP.of_records(2)], LIMITS.study_delta)
    assert worst > epsilon_spent([STEP], LIMITS.study_delta)
    text = show(ledger.refresh(), LIMITS)
    assert "1 ids are of people who are in it under another id too" in text
    assert f"up to epsilon {rounded_up(worst)} at delta" in text
    (found,) = (s for s in figures.spent(ledger.book, LIMITS)["studies"] if s["study"] == "kidney")
    assert found["epsilon_of_several_records"] == worst


def test_a_study_is_shown_at_the_delta_of_its_plan_and_all_of_them_at_the_policys(
    tmp_path: Path,
) -> None:
    ledger = created(tmp_path)
    ledger.register(study(), LIMITS, epsilon=8, delta=1e-7)
    ledger.reserve(digest("r"), "liver", "train", STEP, LIMITS)
    at_the_plans = epsilon_spent([STEP], 1e-7)
    assert at_the_plans > 1.1 * epsilon_spent([STEP], LIMITS.study_delta)
    text = show(ledger.book, LIMITS)
    assert f"epsilon {rounded_up(at_the_plans)} of" in text and "at delta 1e-07  (" in text
    rule = PrivacyFilter(LIMITS.total_epsilon, LIMITS.total_delta, ledger.book.order)
    total = rounded_up(rule.epsilon_so_far(rule.cost([STEP])))
    assert f"no patient more than epsilon {total} at delta 1e-05, which is the policy's" in text
    (found,) = figures.spent(ledger.book, LIMITS)["studies"]
    assert (found["delta"], found["delta_is_of"]) == (1e-7, "plan")
    assert found["train"]["epsilon_spent"] == at_the_plans


def test_a_register_from_before_deltas_were_written_keeps_its_hash_and_is_the_same(
    ledger: Ledger, tmp_path: Path
) -> None:
    other = study("kidney")
    row = next_row(3, ledger.rows[-1].hash, now(), other)
    assert "delta" not in row.text
    with closing(sqlite3.connect(place(tmp_path))) as database:
        insert(database, row)
        database.commit()
    ledger = reopened(tmp_path)
    registered(ledger, other)
    assert ledger.rows[-1] == row, "registering it again is nothing new"
    ledger.reserve(digest("r"), "kidney", "train", STEP, LIMITS)
    text = show(ledger.book, LIMITS)
    assert "at delta 1e-05 (the policy, whose largest this is)" in text
    back, _ = restored(tmp_path)
    assert next(r for r in back.rows if r.n == 3).hash == row.hash
