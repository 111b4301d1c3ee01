"""Whatever is changed in a ledger shows, and a write that fails leaves nothing half done."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from small_ledgers import (
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
    spent,
    study,
    witness,
)

from fedseg.chain import Chain
from fedseg.errors import StorageError, TrustError
from fedseg.privacy.ledger import Ledger, patient_key
from fedseg.privacy.ledger.file import insert


def edited(folder: Path, *statements: str) -> None:
    """Change the file as somebody would who means harm."""
    with closing(sqlite3.connect(place(folder), isolation_level=None)) as database:
        database.executescript("DROP TRIGGER no_update; DROP TRIGGER no_delete;")
        for statement in statements:
            database.execute(statement)


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
