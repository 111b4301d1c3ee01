"""The hospital's privacy ledger in SITEDIR: where it lies, who begins it, what is registered in it.

The file and its secret lie with the trainer's keys, and the site's audit is its witness. It begins
when the first plan with a guarantee is approved and never again: where the audit knows of a ledger
and there is none, somebody lost or removed it, and nothing goes on before `ledger restore`. A study
is registered before its approval is written, so that no approved private plan lacks a register.
Callers act as the owner of `trainer/`; see `sites.rights.as_owner_of`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedseg.errors import PlanError, PrivacyError, TrustError
from fedseg.privacy.ledger import AuditWitness, Ledger, Limits
from fedseg.privacy.ledger.entries import Registered
from fedseg.privacy.ledger.restore import restore, sound_rows
from fedseg.privacy.schedule import allowed
from fedseg.security.keys import SigningKey
from fedseg.security.secretfile import read_secret, write_secret
from sites.folder import SiteFolder
from sites.policy import limits_of, load_policy

if TYPE_CHECKING:
    from fedseg.imaging.cases import Cohort
    from fedseg.plan import StudyPlan
    from sites.approval import CohortRecord

SECRET_BYTES = 32
Now = Callable[[], str]


def open_ledger(folder: SiteFolder, signing: SigningKey, now: Now) -> Ledger:
    """The ledger, once all of it holds against the audit; none is begun.

    Raises:
        PrivacyError: there never was one.
        TrustError: it or its secret is missing, was edited, or was put back to an older state.
    """
    _require_begun(folder, signing, now)
    return Ledger.open(folder.ledger, _secret(folder), _witness(folder, signing, now), now)


def begun(folder: SiteFolder, signing: SigningKey, now: Now) -> bool:
    """Whether this site has a ledger, or its audit knows of one.

    Raises:
        TrustError: the audit was changed.
    """
    return folder.ledger.exists() or bool(_witness(folder, signing, now).seen())


def look_at(folder: SiteFolder, signing: SigningKey, now: Now) -> tuple[Ledger, int]:
    """The ledger, verified, without a word written to it or to the audit.

    Returns:
        The ledger, and how many of its rows the audit has not seen: what a crash left, whose work
        never began; the next use of the ledger enters them there.

    Raises:
        PrivacyError: there never was one.
        TrustError: as `open_ledger`.
    """
    _require_begun(folder, signing, now)
    ledger = Ledger(folder.ledger, _secret(folder), _witness(folder, signing, now), now)
    return ledger, len(ledger.verify())


def register(
    folder: SiteFolder, plan: StudyPlan, cohort: Cohort, signing: SigningKey, now: Now
) -> None:
    """Register a private plan's patients and schedule; the ledger begins with the first.

    Patients to train on and patients held back are registered; those kept for a last test never
    meet the study. Patients who withdrew and whose data are gone stay in a study's register.

    Raises:
        PrivacyError: the policy sets no budget, the plan costs more than it promises or than the
            policy allows, some patient has too little left, or the study's register is frozen.
        DataError: a patient was withdrawn, or is in the cohort under an old id.
        TrustError: the ledger is missing, was edited, or was rolled back.
    """
    promise = plan.private
    if promise is None:
        raise PlanError(f"the plan of {plan.study} has no guarantee: nothing is registered for it")
    limits = limits_of(load_policy(folder.policy))
    schedule = allowed(plan)
    ledger = _begun(folder, signing, now, limits)
    event = Registered(
        study=plan.study,
        plan=plan.digest,
        train=_keys(ledger, cohort.split("train")),
        val=_keys(ledger, cohort.split("val")),
        schedule=schedule,
    )
    event = _with_withdrawn(ledger, event)
    ledger.register(event, limits, epsilon=promise.epsilon, delta=promise.delta)


def require_registered(ledger: Ledger, plan: StudyPlan, *, closed_too: bool = False) -> None:
    """Accept a private plan whose register is open in the ledger.

    Args:
        closed_too: or closed, for what touches no patient.

    Raises:
        PrivacyError: it is not registered, for another plan, or closed.
        TrustError: the ledger was put back or removed while it was in use.
    """
    study = ledger.refresh().studies.get(plan.study)
    known = study is not None and study.registered.plan == plan.digest
    if study is None or not known or (study.closed is not None and not closed_too):
        raise PrivacyError(
            f"the plan of {plan.study} has no open register in the ledger, so nobody would be "
            f"charged: `fedseg-site plan approve {plan.study}` makes one"
        )


def close(folder: SiteFolder, study: str, reason: str, signing: SigningKey, now: Now) -> bool:
    """Close a study's register, where there is an open one: what it had left is free for others.

    Returns:
        Whether there was one.

    Raises:
        TrustError: the ledger was edited or rolled back.
    """
    if not folder.ledger.exists():
        return False
    ledger = open_ledger(folder, signing, now)
    found = ledger.book.studies.get(study)
    if found is None or found.closed is not None:
        return False
    ledger.close(study, reason)
    return True


def training_patients(
    folder: SiteFolder,
    plan: StudyPlan,
    chosen: CohortRecord,
    cohort: Cohort | None,
    signing: SigningKey,
    now: Now,
) -> int:
    """How many patients of chosen data can be trained on: who withdrew cannot.

    Args:
        cohort: what `chosen` is of, where it was just looked at; else it is read where somebody
            withdrew.

    Raises:
        TrustError: the ledger was edited or rolled back.
        DataError: the data changed since they were chosen.
    """
    known = bool(_witness(folder, signing, now).seen() or sound_rows(folder.ledger))
    if not (folder.ledger.exists() and known):  # none yet, or one whose beginning a crash cut short
        return chosen.patients.get("train", 0)
    ledger, _ = look_at(folder, signing, now)
    if not ledger.book.withdrawn:
        return chosen.patients.get("train", 0)
    from sites.cohort import recorded_cohort

    cohort = cohort or recorded_cohort(folder.record.name, plan, chosen)
    return len(without_withdrawn(ledger, cohort).split("train").patients)


def without_withdrawn(ledger: Ledger, cohort: Cohort) -> Cohort:
    """A cohort less the patients who withdrew under any of their ids."""
    book = ledger.refresh()
    if not book.withdrawn:
        return cohort
    gone = {p for p in cohort.patients if book.has_withdrawn(ledger.key_of(p))}
    return cohort.without(case.name for case in cohort.cases if case.patient in gone)


def put_back(
    folder: SiteFolder,
    backups: tuple[Path, ...],
    reason: str,
    signing: SigningKey,
    now: Now,
    *,
    to_the_end: bool = False,
    new_secret: bool = False,
) -> tuple[Ledger, int]:
    """Restore the ledger from what is left of it, from copies and from the audit.

    Args:
        backups: copies of ledger.sqlite.
        to_the_end: the audit was put back too, so nobody here knows what was done since: open
            studies are charged with all that their schedules had left, and closed.
        new_secret: the secret is lost: patients cannot be told apart any more, so every debit that
            the audit knows of is charged to everyone. What is left of the ledger is put aside.

    Returns:
        The ledger, and how many debits were written anew.

    Raises:
        TrustError: the audit was changed, the secret is missing, or a copy is another site's.
        PrivacyError: the policy sets no budget.
        StorageError: it could not be written.
    """
    limits, witness = limits_of(load_policy(folder.policy)), _witness(folder, signing, now)
    witness.seen()  # a changed audit is said before anything is touched
    if new_secret:
        _put_aside(folder)
        write_secret(folder.ledger_secret, secrets.token_bytes(SECRET_BYTES))
    return restore(
        folder.ledger,
        backups,
        _secret(folder),
        witness,
        now,
        limits=limits,
        reason=reason,
        to_the_end=to_the_end,
    )


def _begun(folder: SiteFolder, signing: SigningKey, now: Now, limits: Limits) -> Ledger:
    """The ledger; a new one where there never was one."""
    witness = _witness(folder, signing, now)
    if witness.seen() or sound_rows(folder.ledger):
        return open_ledger(folder, signing, now)
    if not folder.ledger_secret.exists():
        write_secret(folder.ledger_secret, secrets.token_bytes(SECRET_BYTES))
    return Ledger.create(folder.ledger, _secret(folder), witness, now, limits)


def _require_begun(folder: SiteFolder, signing: SigningKey, now: Now) -> None:
    """Tell a site that never had a ledger from one that lost it."""
    if not begun(folder, signing, now):
        raise PrivacyError(
            "this site has no ledger yet: one begins when the first plan with a privacy guarantee "
            "is approved"
        )


def _witness(folder: SiteFolder, signing: SigningKey, now: Now) -> AuditWitness:
    """The site's audit."""
    return AuditWitness(folder.audit, signing, now)


def _secret(folder: SiteFolder) -> bytes:
    """The secret, for its owner alone and whole."""
    if not folder.ledger_secret.exists():
        raise TrustError(
            f"{folder.ledger_secret.name} is missing: without it the ledger cannot tell whose "
            "spend is whose; bring it back from a backup of the trainer's folder"
        )
    secret = read_secret(folder.ledger_secret)
    if len(secret) != SECRET_BYTES:
        raise TrustError(
            f"{folder.ledger_secret.name} has {len(secret)} bytes, expected {SECRET_BYTES}: bring "
            "it back from a backup of the trainer's folder"
        )
    return secret


def _keys(ledger: Ledger, part: Cohort) -> tuple[str, ...]:
    """The patients of one split, as the ledger calls them, sorted so that order tells nothing."""
    return tuple(sorted(map(ledger.key_of, part.patients)))


def _with_withdrawn(ledger: Ledger, event: Registered) -> Registered:
    """The register that a study has, where the new one lacks nobody but who has withdrawn."""
    book = ledger.refresh()
    study = book.studies.get(event.study)
    if study is None:
        return event
    have = study.registered
    for old, new in ((have.train, event.train), (have.val, event.val)):
        gone = set(old) - set(new)
        if set(new) - set(old) or not all(map(book.has_withdrawn, gone)):
            return event
    same = (have.plan, have.schedule) == (event.plan, event.schedule)
    return have if same else event


def _put_aside(folder: SiteFolder) -> None:
    """Rename what is left of a ledger and its secret, so that neither is read nor lost."""
    for path in (folder.ledger, folder.ledger_secret):
        if path.exists():
            number = 1
            while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
                number += 1
            path.rename(aside)
