"""What was spent, in words and numbers for people."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from small_ledgers import (
    LIMITS,
    STEP,
    created,
    digest,
    now,
    patient,
    place,
    registered,
    reopened,
    restored,
    study,
)

from fedseg.privacy.accounting import PrivacyFilter, epsilon_spent
from fedseg.privacy.guarantee import rounded_up
from fedseg.privacy.ledger import Ledger, figures
from fedseg.privacy.ledger.entries import next_row
from fedseg.privacy.ledger.file import insert
from fedseg.privacy.ledger.views import budget, export, show


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
