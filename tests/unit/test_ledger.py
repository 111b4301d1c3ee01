"""The ledger: a debit outlives everything, nobody overspends, and old ids carry what they spent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_ledgers import (
    LIMITS,
    SCORE,
    STEP,
    created,
    digest,
    patient,
    registered,
    reopened,
    spent,
    study,
)

from fedseg.errors import DataError, PrivacyError
from fedseg.privacy.accounting import epsilon_spent
from fedseg.privacy.ledger import Ledger
from fedseg.privacy.ledger.views import withdrawal
from fedseg.privacy.mechanisms import Mechanism


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


def test_a_person_with_records_in_both_uses_must_have_room_for_both(tmp_path: Path) -> None:
    tight = replace(LIMITS, total_epsilon=2.7)
    ledger = created(tmp_path, tight)
    registered(ledger, study("one", range(20, 30), range(30, 33)), tight)  # fits for anyone once
    ledger.link((patient(90),), (patient(0), patient(1)), "one number, perhaps one person")
    ledger.link((patient(0),), (patient(0), patient(1)), "and so it was")
    with pytest.raises(PrivacyError, match="1 of the 14 patients"):
        registered(ledger, study("two"), tight)
