"""A ledger, an audit and keys for each simulated hospital: private plans are charged as for real.

They lie in the site's folder of the simulation. The limits are those of a hospital that takes part
in this study alone: what the plan promises.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from fedseg.errors import DataError, PlanError, PrivacyError
from fedseg.imaging.cases import Cohort
from fedseg.plan import StudyPlan
from fedseg.privacy.accounting import PrivacyFilter
from fedseg.privacy.ledger import AuditWitness, Ledger, Limits
from fedseg.privacy.ledger.entries import Registered
from fedseg.privacy.mechanisms import Mechanism
from fedseg.privacy.noise import Noise
from fedseg.privacy.schedule import allowed
from fedseg.security.keys import SigningKey
from fedseg.security.secretfile import read_secret, write_secret
from sites.spending import Account

LEDGER, AUDIT, SECRET, KEY = "ledger.sqlite", "audit.jsonl", "ledger.secret", "signing.key"
_BYTES = 32


def register(plan: StudyPlan, cohort: Cohort, folder: Path) -> None:
    """Begin a site's ledger and register the study in it; what is there already is left alone.

    Raises:
        PrivacyError: the plan's noise is weaker than its promise, or its delta too large.
        TrustError: the ledger was changed.
    """
    if plan.private is None:
        raise PlanError("the plan has no guarantee: nothing is registered for it")
    for name in (SECRET, KEY):
        if not (folder / name).exists():
            write_secret(folder / name, secrets.token_bytes(_BYTES))
    limits, ledger = _limits(plan), _begun(plan, folder)
    train, val = (
        tuple(sorted(ledger.key_of(p) for p in cohort.split(use).patients))
        for use in ("train", "val")
    )
    event = Registered(
        study=plan.study, plan=plan.digest, train=train, val=val, schedule=allowed(plan)
    )
    ledger.register(event, limits, epsilon=plan.private.epsilon, delta=plan.private.delta)


def account_of(plan: StudyPlan, folder: Path) -> Account:
    """What a site's trainer draws on, once it is registered.

    Raises:
        TrustError: the ledger is missing or was changed.
    """
    ledger = Ledger.open(folder / LEDGER, read_secret(folder / SECRET), _witness(folder), _now)
    return Account(ledger, plan, folder / "answers", lambda: _limits(plan))


def seeded(seed: int | None) -> Callable[[str], Noise] | None:
    """Sources of chance that repeat, one a purpose; None for the operating system's."""
    if seed is None:
        return None
    return lambda purpose: Noise.seeded(seed, purpose)


def _begun(plan: StudyPlan, folder: Path) -> Ledger:
    """The site's ledger, made where there is none; a crash while it was made is made good."""
    path, secret, witness = folder / LEDGER, read_secret(folder / SECRET), _witness(folder)
    if not witness.seen():
        try:
            return Ledger.create(path, secret, witness, _now, _limits(plan))
        except DataError:  # its first row is there, and the crash came before the audit's
            pass
    return Ledger.open(path, secret, witness, _now)


def _witness(folder: Path) -> AuditWitness:
    """The site's audit."""
    return AuditWitness(folder / AUDIT, SigningKey(read_secret(folder / KEY)), _now)


def _now() -> str:
    """When a row is written."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _limits(plan: StudyPlan) -> Limits:
    """The plan's promise, and over all studies as much as lets this one be seen through.

    The filter over all studies counts more loosely than the accountant of one fixed schedule.
    """
    promise = plan.private
    assert promise is not None  # asked for private plans alone
    total = promise.epsilon
    while not all(_fits(each.mechanism, total, promise.delta) for each in allowed(plan)):
        total *= 1.25
    return Limits(promise.epsilon, promise.delta, total, promise.delta)


def _fits(mechanism: Mechanism, epsilon: float, delta: float) -> bool:
    """Whether a budget over all studies has room for this."""
    try:
        rule = PrivacyFilter.for_budget(epsilon, delta)
    except PrivacyError:  # not even for nothing
        return False
    return rule.room(0.0, rule.cost([mechanism]))
