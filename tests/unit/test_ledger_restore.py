"""A ledger that is put back: what the audit has seen is paid for, and nobody is paid less."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_ledgers import (
    KEY,
    LIMITS,
    SCORE,
    SECRET,
    STEP,
    digest,
    now,
    patient,
    place,
    registered,
    reopened,
    restored,
    spent,
    study,
    witness,
)

from fedseg.chain import verify_chain
from fedseg.errors import PrivacyError, TrustError
from fedseg.privacy.ledger import Ledger
from fedseg.privacy.ledger.restore import restore
from fedseg.privacy.ledger.views import show


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
