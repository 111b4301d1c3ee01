"""Whether there is room left: what a debit or a whole study would cost every patient who is in it.

Each patient is asked with all records that are known to be theirs, and by the filter's order that
the ledger was begun with. A study is held against what open studies may still charge as well; a
debit against what was charged.
"""

from __future__ import annotations

from fedseg.errors import PrivacyError
from fedseg.privacy.accounting import PrivacyFilter, epsilon_spent
from fedseg.privacy.ledger.book import Book, History, Limits
from fedseg.privacy.ledger.entries import Patient, Registered
from fedseg.privacy.mechanisms import Allowed, Mechanism, Use


def require_promise(schedule: tuple[Allowed, ...], epsilon: float, delta: float) -> None:
    """Refuse a schedule that costs more than is promised, on either use.

    Raises:
        PrivacyError: it does.
    """
    for use in ("train", "val"):
        work = [each.mechanism for each in schedule if each.use == use]
        if (cost := epsilon_spent(work, delta)) > epsilon:
            raise PrivacyError(
                f"the schedule costs each patient ({use}) epsilon {cost:.4g} at delta {delta:g}, "
                f"more than the {epsilon:g} that the plan promises: its noise is too weak"
            )


def require_room_for_all(book: Book, event: Registered, limits: Limits) -> None:
    """Refuse a study that some patient, with all records, could not see through to its end.

    Raises:
        PrivacyError: somebody has too little left.
    """
    rule = _filter(book, limits)
    sums = _Sums(book, rule, without=event.study)
    study = book.studies.get(event.study)
    again = study is not None and study.registered == event
    schedule = book.left(event.study) if again else event.schedule
    cohorts: dict[Use, frozenset[Patient]] = {
        "train": frozenset(event.train), "val": frozenset(event.val)
    }  # fmt: skip
    short = 0
    for patient in cohorts["train"] | cohorts["val"]:
        ids = book.known_ids(patient)
        cost = rule.cost(
            each.mechanism.of_records(records)
            for each in schedule
            if (records := len(ids & cohorts[each.use]))
        )
        short += not rule.room(sums.spent(patient) + sums.promised(patient), cost)
    if short:
        raise PrivacyError(
            f"{short} of the {len(event.train) + len(event.val)} patients have too little of their "
            f"budget left for all of {event.study} (total_epsilon {limits.total_epsilon:g} at "
            f"total_delta {limits.total_delta:g}): leave them out or refuse the study"
        )


def require_room(
    book: Book, cohort: frozenset[Patient], mechanism: Mechanism, limits: Limits
) -> None:
    """Stop where somebody's sum would leave the filter's budget.

    Raises:
        PrivacyError: it would.
    """
    rule = _filter(book, limits)
    sums = _Sums(book, rule)
    short = 0
    for patient in book.people(cohort):
        records = max(1, len(book.known_ids(patient) & cohort))
        cost = rule.cost([mechanism.of_records(records)])
        short += not rule.room(sums.spent(patient), cost)
    if short:
        raise PrivacyError(
            f"{short} patients have no budget left for this (total_epsilon "
            f"{limits.total_epsilon:g} at total_delta {limits.total_delta:g}): no training"
        )


def _filter(book: Book, limits: Limits) -> PrivacyFilter:
    """The stop rule, at the ledger's order."""
    return PrivacyFilter(limits.total_epsilon, limits.total_delta, book.order)


class _Sums:
    """Sums of Renyi divergences, computed once for all patients who share a history."""

    def __init__(self, book: Book, rule: PrivacyFilter, without: str = "") -> None:
        self._book, self._rule, self._without = book, rule, without
        self._spent: dict[History, float] = {}
        self._promised: dict[History, float] = {}

    def spent(self, patient: Patient) -> float:
        """What a patient was charged."""
        history = self._book.history(patient)
        if history not in self._spent:
            self._spent[history] = self._rule.cost(self._book.charges(patient))
        return self._spent[history]

    def promised(self, patient: Patient) -> float:
        """What open studies may still charge a patient."""
        history = self._book.history(patient)
        if history not in self._promised:
            work = self._book.promised(patient, self._without)
            self._promised[history] = self._rule.cost(work)
        return self._promised[history]
