"""The ledger as a state machine: in whatever order it is used, crashes and comes back, it holds."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from small_ledgers import (
    LIMITS,
    SECRET,
    STEP,
    created,
    digest,
    now,
    patient,
    place,
    reopened,
    study,
    witness,
)

from fedseg.errors import DataError, PrivacyError, TrustError
from fedseg.privacy.accounting import PrivacyFilter
from fedseg.privacy.ledger.restore import restore

TIGHT = replace(LIMITS, total_epsilon=3.0)
COHORTS = {"liver": range(4), "brain": range(2, 6)}


class Crash(BaseException):
    """The process dies here."""


class Ledgers(RuleBasedStateMachine):
    """What the ledger says against a plain list of what was debited and answered."""

    tasks = Bundle("tasks")

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.ledger = created(self.folder, TIGHT)
        self.debited: dict[str, str] = {}
        self.answers: dict[str, str] = {}
        self.links: list[tuple[int, int]] = []
        self.most: dict[int, float] = {}
        self.number = 0
        self.strict = True
        self.backup: Path | None = None
        self.register("liver", COHORTS["liver"])

    def register(self, name: str, cohort: range) -> None:
        event = study(name, cohort, range(20, 21), rounds=6)
        self.ledger.register(event, LIMITS, epsilon=8, delta=1e-5)

    @rule()
    def register_the_other(self) -> None:
        if "brain" not in self.ledger.book.studies:
            with suppress(DataError, PrivacyError):  # old ids, or its register was lost
                self.register("brain", COHORTS["brain"])

    @rule(target=tasks, name=st.sampled_from(sorted(COHORTS)))
    def reserve(self, name: str) -> str:
        self.number += 1
        return self.try_to_reserve(f"{name} {self.number}")

    @rule(task=tasks)
    def retry(self, task: str) -> None:
        self.try_to_reserve(task)

    def try_to_reserve(self, task: str) -> str:
        name = task.split(maxsplit=1)[0]
        try:
            found = self.ledger.reserve(digest(task), name, "train", STEP, TIGHT)
        except PrivacyError:
            assert task not in self.debited, "what is paid for is never refused"
            return task
        assert found.answer == self.answers.get(task)
        self.debited[task] = name
        return task

    @rule(target=tasks, name=st.sampled_from(sorted(COHORTS)))
    def crash_between_row_and_audit(self, name: str) -> str:
        """The debit stays, though nobody was told that it was made."""
        self.number += 1
        task = f"{name} {self.number}"
        with pytest.MonkeyPatch.context() as patch:

            def die(*_: object, **__: object) -> None:
                raise Crash

            patch.setattr("fedseg.chain.Chain.append", die)
            try:
                self.try_to_reserve(task)
            except Crash:
                self.debited[task] = name
        self.ledger = reopened(self.folder)
        return task

    @rule(task=tasks, text=st.sampled_from("ab"))
    def commit(self, task: str, text: str) -> None:
        answer = digest(task + text)
        allowed = task in self.debited and self.answers.get(task, answer) == answer
        try:
            self.ledger.commit(digest(task), answer)
        except PrivacyError:
            assert not allowed
        else:
            assert allowed
            self.answers[task] = answer

    @rule()
    def restart(self) -> None:
        self.ledger = reopened(self.folder)

    @rule(old=st.integers(0, 8), new=st.integers(0, 8))
    def link(self, old: int, new: int) -> None:
        self.ledger.link((patient(old),), (patient(new),), "moved")
        self.links.append((old, new))

    @rule()
    def back_up(self) -> None:
        self.backup = Path(shutil.copy(place(self.folder), self.folder / "backup"))

    @rule()
    def roll_back_and_restore(self) -> None:
        if self.backup is None:
            return
        rows = len(self.ledger.rows)
        shutil.copy(self.backup, place(self.folder))
        try:
            self.ledger = reopened(self.folder)
            assert len(self.ledger.rows) == rows, "a rollback went unseen"
        except TrustError:
            self.ledger, _ = restore(
                place(self.folder), [self.backup], SECRET, witness(self.folder), now,
                limits=TIGHT, reason="test",
            )  # fmt: skip
        # The audit holds debits, answers and links; registers after the backup are lost, and debits
        # of lost registers are charged to all.
        self.strict = False

    @invariant()
    def every_debit_and_answer_is_there(self) -> None:
        book = self.ledger.refresh()
        found = {key: debit.answer for key, debit in book.debits.items()}
        expected = {digest(t): self.answers.get(t) for t in self.debited}
        assert found == expected

    @invariant()
    def nobody_is_forgotten_or_overspends(self) -> None:
        book = self.ledger.book
        rule = PrivacyFilter(TIGHT.total_epsilon, TIGHT.total_delta, book.order)
        for number in range(9):
            charged = book.charges(patient(number))
            cost = rule.cost(charged)
            own = [n for t, n in self.debited.items() if number in COHORTS[n]]
            least = STEP.steps * len(own)
            assert sum(m.steps for m in charged) >= least or any(
                m.noise_multiplier < STEP.noise_multiplier for m in charged
            )
            assert cost >= self.most.get(number, 0.0) - 1e-12, "a spend became smaller"
            if self.strict and not self.links:
                assert rule.room(cost - 1e-12), "somebody overspent"
            self.most[number] = cost
        for old, new in self.links:
            assert (
                rule.cost(book.charges(patient(new)))
                >= rule.cost(book.charges(patient(old))) - 1e-12
                or (new, old) in self.links
            )

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


Ledgers.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLedgers = Ledgers.TestCase
