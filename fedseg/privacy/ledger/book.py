"""What the rows of a ledger add up to, and which events may follow. Computes; stores nothing.

Who is charged: all patients of the study's frozen register in the use that a reservation names,
drawn or not. A person's spend is that of every id that was linked to the person's: whoever moves,
splits or merges carries all that went before under any of them, so never less than the largest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fedseg.errors import DataError, PrivacyError
from fedseg.privacy.ledger.entries import (
    Answered,
    Closed,
    Event,
    Linked,
    Opened,
    Patient,
    Recovered,
    Registered,
    Reserved,
    Restored,
    Retried,
    Withdrawn,
)
from fedseg.privacy.mechanisms import Allowed, Mechanism, Use, merged

History = frozenset[tuple[str, Use, int]]


@dataclass(frozen=True)
class Limits:
    """What the hospital's policy allows any patient to be charged.

    Attributes:
        study_epsilon: the most that a study's fixed schedule may cost.
        study_delta: the largest delta that a plan may name.
        total_epsilon: the most over all studies, by the privacy filter.
        total_delta: likewise.
    """

    study_epsilon: float
    study_delta: float
    total_epsilon: float
    total_delta: float


@dataclass
class Debit:
    """One reservation.

    Attributes:
        everyone: charged to every patient, since the register is lost.
        attempts: how often work on it began.
        answer: the digest of its one answer, once there is one.
        at: when it was written.
    """

    reservation: str
    study: str
    use: Use
    mechanism: Mechanism
    at: str
    everyone: bool = False
    attempts: int = 1
    answer: str | None = None


@dataclass
class Study:
    """One study's register."""

    registered: Registered
    at: str
    closed: str | None = None

    def __post_init__(self) -> None:
        self.train, self.val = frozenset(self.registered.train), frozenset(self.registered.val)

    def cohort(self, use: Use) -> frozenset[Patient]:
        """The patients of one use."""
        return self.train if use == "train" else self.val

    def delta(self, limits: Limits) -> float:
        """The delta at which its epsilon is told: the plan's; the policy's where none is known."""
        return self.registered.delta or limits.study_delta


@dataclass
class Book:
    """The state after some rows."""

    opened: Opened | None = None
    studies: dict[str, Study] = field(default_factory=dict)
    debits: dict[str, Debit] = field(default_factory=dict)
    withdrawn: dict[Patient, str] = field(default_factory=dict)
    retired: set[Patient] = field(default_factory=set)
    restored: list[str] = field(default_factory=list)
    _parents: dict[Patient, set[Patient]] = field(default_factory=dict)

    @property
    def order(self) -> float:
        """The filter's Renyi order."""
        if self.opened is None:
            raise DataError("the ledger is empty: it was never opened")
        return self.opened.order

    def apply(self, event: Event, at: str) -> None:
        """Take one more event in; what may follow was checked before it was written."""
        match event:
            case Opened():
                self.opened = event
            case Registered():
                self.studies[event.study] = Study(event, at)
            case Reserved() | Recovered():
                everyone = isinstance(event, Recovered) and (
                    event.everyone or event.study not in self.studies
                )
                self.debits[event.reservation] = Debit(
                    event.reservation, event.study, event.use, event.mechanism, at, everyone
                )
            case Retried():
                self.debits[event.reservation].attempts += 1
            case Answered():
                self.debits[event.reservation].answer = event.answer
            case Closed():
                self.studies[event.study].closed = event.reason
            case Linked():
                self._link(event)
            case Withdrawn():
                self.withdrawn[event.patient] = at
            case Restored():
                self.restored.append(at)

    def known_ids(self, patient: Patient) -> frozenset[Patient]:
        """Every id under which this patient's data may have been charged."""
        found, waiting = {patient}, [patient]
        while waiting:
            for parent in self._parents.get(waiting.pop(), ()):
                if parent not in found:
                    found.add(parent)
                    waiting.append(parent)
        return frozenset(found)

    def people(self, patients: Iterable[Patient]) -> tuple[Patient, ...]:
        """The patients, and whoever carries the charges of one of them."""
        named = set(patients)
        heirs = {p for p in self._parents if self.known_ids(p) & named}
        return tuple(sorted(named | heirs))

    def several_records(self, study: str) -> tuple[Patient, ...]:
        """The people who are in a study's register under more than one id: charged for each."""
        register = self.studies[study].train | self.studies[study].val
        return tuple(p for p in self.people(register) if len(self.known_ids(p) & register) > 1)

    @property
    def patients(self) -> tuple[Patient, ...]:
        """Everyone who was ever registered or linked."""
        registers = [s.registered for s in self.studies.values()]
        return self.people(p for r in registers for p in (*r.train, *r.val))

    def history(self, patient: Patient) -> History:
        """In which registers a patient is, and how often; equal histories are charged equally."""
        records = self._records(self.known_ids(patient))
        return frozenset((study, use, n) for (study, use), n in records.items() if n)

    def charges(self, patient: Patient, study: str | None = None) -> tuple[Mechanism, ...]:
        """All that a patient was charged, in one study or in all."""
        ids = self.known_ids(patient)
        counts = self._records(ids)
        found = []
        for debit in self.debits.values():
            if study in (None, debit.study):
                records = 1 if debit.everyone else counts[debit.study, debit.use]
                if records:
                    found.append(debit.mechanism.of_records(records))
        return merged(found)

    def promised(self, patient: Patient, without: str = "") -> tuple[Mechanism, ...]:
        """What open studies may still charge a patient."""
        counts = self._records(self.known_ids(patient))
        return merged(
            allowed.mechanism.of_records(counts[name, allowed.use])
            for name, study in self.studies.items()
            if name != without and study.closed is None
            for allowed in self.left(name)
            if counts[name, allowed.use]
        )

    def left(self, study: str) -> tuple[Allowed, ...]:
        """What a study's schedule still allows."""
        used = self._used(study)
        found = []
        for (use, kind), steps in _scheduled(self.studies[study].registered.schedule).items():
            if steps > used[use, kind]:
                whole = kind.model_copy(update={"steps": steps - used[use, kind]})
                found.append(Allowed(use=use, mechanism=whole))
        return tuple(found)

    def has_withdrawn(self, patient: Patient) -> bool:
        """Whether a patient withdrew, under any id."""
        return not self.known_ids(patient).isdisjoint(self.withdrawn)

    def went_into(self, patient: Patient) -> tuple[Debit, ...]:
        """Every piece of work that a patient's data were, or may have been, part of."""
        counts = self._records(self.known_ids(patient))
        return tuple(d for d in self.debits.values() if d.everyone or counts[d.study, d.use])

    def require_new_register(self, event: Registered) -> None:
        """Accept a study's register; the same one opens a closed study again.

        Raises:
            PrivacyError: work was done under another one.
            DataError: a patient is in it twice, withdrawn, or goes by another id now.
        """
        study = self.studies.get(event.study)
        if study is not None and study.registered == event:
            return
        if study is not None and self._used(event.study):
            raise PrivacyError(
                f"the register of {event.study} is frozen, since patients were charged under it: "
                "a changed cohort, plan or schedule is another study, under another name"
            )
        everyone = [*event.train, *event.val]
        if not event.train or len(set(everyone)) != len(everyone):
            raise DataError("a register needs training patients, and each patient once")
        if gone := sum(self.has_withdrawn(p) for p in everyone):
            raise DataError(f"{gone} of the cohort's patients were withdrawn: leave them out")
        if old := sum(p in self.retired for p in everyone):
            raise DataError(
                f"{old} of the cohort's patients go by another id since records were moved, split "
                "or merged: register them under that id"
            )

    def require_allowed(self, event: Reserved) -> Study:
        """Accept work as part of a study's schedule.

        Raises:
            PrivacyError: the study is not registered or is closed, the work is of another kind
                than its schedule (weaker noise, another rate), or the schedule is used up.
        """
        study = self.studies.get(event.study)
        if study is None or study.closed is not None:
            state = "is not registered" if study is None else "was closed"
            raise PrivacyError(f"the study {event.study} {state} in the ledger: no training")
        kind = event.mechanism.model_copy(update={"steps": 1})
        left = {
            (a.use, a.mechanism.model_copy(update={"steps": 1})): a.mechanism.steps
            for a in self.left(event.study)
        }
        if event.mechanism.steps > left.get((event.use, kind), 0):
            raise PrivacyError(
                f"{event.mechanism.steps} more steps with noise multiplier "
                f"{kind.noise_multiplier:g} and rate {kind.rate:g} ({event.use}) are not in what "
                f"is left of the schedule that was approved for {event.study}"
            )
        return study

    def _link(self, event: Linked) -> None:
        for patient in event.new:
            self._parents.setdefault(patient, set()).update(set(event.old) - {patient})
        self.retired |= set(event.old)
        self.retired -= set(event.new)

    def _records(self, ids: frozenset[Patient]) -> Counter[tuple[str, Use]]:
        """Under how many ids someone is in each register."""
        found: Counter[tuple[str, Use]] = Counter()
        for name, study in self.studies.items():
            found[name, "train"] = len(ids & study.train)
            found[name, "val"] = len(ids & study.val)
        return found

    def _used(self, study: str) -> Counter[tuple[Use, Mechanism]]:
        """How many steps of each kind were reserved."""
        found: Counter[tuple[Use, Mechanism]] = Counter()
        for debit in self.debits.values():
            if debit.study == study:
                kind = debit.mechanism.model_copy(update={"steps": 1})
                found[debit.use, kind] += debit.mechanism.steps
        return found


def _scheduled(schedule: Sequence[Allowed]) -> Counter[tuple[Use, Mechanism]]:
    """How many steps of each kind a schedule has."""
    found: Counter[tuple[Use, Mechanism]] = Counter()
    for each in schedule:
        found[each.use, each.mechanism.model_copy(update={"steps": 1})] += each.mechanism.steps
    return found
