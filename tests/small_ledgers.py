"""A ledger in a folder, with an audit as its witness and patients by number."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedseg.privacy.accounting import PrivacyFilter
from fedseg.privacy.ledger import AuditWitness, Ledger, Limits, patient_key
from fedseg.privacy.ledger.entries import Registered
from fedseg.privacy.ledger.restore import restore
from fedseg.privacy.mechanisms import Allowed, Mechanism
from fedseg.security.keys import SigningKey

SECRET = b"s" * 32
KEY = SigningKey(b"k" * 32)
LIMITS = Limits(study_epsilon=8, study_delta=1e-5, total_epsilon=10, total_delta=1e-5)
STEP = Mechanism(noise_multiplier=10, steps=5)
SCORE = Mechanism(noise_multiplier=20)


def now() -> str:
    return "2026-05-03T12:00:00+00:00"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def patient(number: int) -> str:
    return patient_key(SECRET, f"patient {number}")


def witness(folder: Path) -> AuditWitness:
    return AuditWitness(folder / "audit.jsonl", KEY, now)


def place(folder: Path) -> Path:
    return folder / "ledger.sqlite"


def created(folder: Path, limits: Limits = LIMITS) -> Ledger:
    return Ledger.create(place(folder), SECRET, witness(folder), now, limits)


def reopened(folder: Path) -> Ledger:
    return Ledger.open(place(folder), SECRET, witness(folder), now)


def study(
    name: str = "liver",
    train: range = range(10),
    val: range = range(10, 14),
    rounds: int = 4,
    step: Mechanism = STEP,
) -> Registered:
    """Some rounds of training and two of validation."""
    schedule = (
        Allowed(use="train", mechanism=step.model_copy(update={"steps": step.steps * rounds})),
        Allowed(use="val", mechanism=SCORE.model_copy(update={"steps": 2})),
    )
    return Registered(
        study=name,
        plan=digest(name),
        train=tuple(map(patient, train)),
        val=tuple(map(patient, val)),
        schedule=schedule,
    )


def registered(ledger: Ledger, event: Registered, limits: Limits = LIMITS) -> None:
    ledger.register(event, limits, epsilon=8, delta=1e-5)


def spent(ledger: Ledger, number: int) -> float:
    """At the ledger's order."""
    rule = PrivacyFilter(LIMITS.total_epsilon, LIMITS.total_delta, ledger.refresh().order)
    return rule.cost(ledger.book.charges(patient(number)))


def restored(folder: Path, *backups: Path) -> tuple[Ledger, int]:
    return restore(
        place(folder), backups, SECRET, witness(folder), now, limits=LIMITS, reason="disk died"
    )
