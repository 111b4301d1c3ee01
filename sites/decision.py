"""The hospital's decision on a plan: what it knows of it, yes, and no.

A yes is refused where the hospital's own policy forbids the plan, and the refusal names the rule.
It covers the list of sites as it stands, and freezes the cohort. Where the plan has a guarantee,
its patients are registered in the ledger first: no approval without somebody who is charged. The
approval is written before a new list of sites is taken: whatever the crash, no list counts that
nobody approved. A no takes an earlier yes back, and frees what the study had not spent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from fedseg.errors import DataError, FedsegError, PlanError, PrivacyError, TrustError
from fedseg.plan import StudyPlan
from fedseg.security.identity import MAX_ROLL_BYTES, Bundle, SignedRoll, open_roll
from fedseg.security.keys import SigningKey, VerifyKey
from sites.approval import Approval, CohortRecord, approved, frozen_record
from sites.audit import record, utc_now
from sites.enrolment import close_register, pinned_bundle
from sites.explain import Situation
from sites.folder import SiteFolder
from sites.keyring import own_identity
from sites.notes import write_note
from sites.origins import keep_note, noted_before
from sites.policy import authorise, load_policy, rules
from sites.rights import as_owner_of
from sites.rolls import accepted_roll, take_roll

if TYPE_CHECKING:
    from fedseg.imaging.cases import Cohort


@dataclass(frozen=True)
class Lists:
    """The accepted list of sites, and a newer one that waits for approval, or None."""

    accepted: SignedRoll
    offered: SignedRoll | None

    @property
    def current(self) -> SignedRoll:
        """The list that an approval would cover."""
        return self.offered or self.accepted

    @property
    def added(self) -> tuple[str, ...]:
        """Sites of it that the accepted list has not."""
        return self.current.roll.added_since(self.accepted.roll)


def lists_of(folder: SiteFolder, bundle: Bundle) -> Lists:
    """The lists of sites of a joined study, verified.

    Raises:
        DataError: the accepted one cannot be read.
        TrustError: one of them was edited.
    """
    key = VerifyKey.from_text(bundle.study_key)
    accepted, path = accepted_roll(folder, bundle.study, key), folder.offered_roll(bundle.study)
    try:
        with path.open("rb") as stream:
            offered = open_roll(stream.read(MAX_ROLL_BYTES + 1), key, bundle.study)
    except FileNotFoundError:
        return Lists(accepted, None)
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror}") from None
    return Lists(accepted, offered if offered.roll.version > accepted.roll.version else None)


def situation_of(folder: SiteFolder, study: str) -> Situation:
    """All that this hospital knows of a study.

    Raises:
        DataError: it has not joined it, or a file cannot be read.
        TrustError: a file was edited.
    """
    bundle = pinned_bundle(folder, study)
    lists, approval = lists_of(folder, bundle), approved(folder, study)
    chosen = frozen_record(folder, study, bundle.plan.digest)
    patients = chosen.patients.get("train", 0) if chosen else None
    return Situation(
        bundle=bundle,
        roll=lists.current.roll,
        added=lists.added if approval else (),
        approval=approval,
        record=chosen,
        rules=rules(load_policy(folder.policy), bundle.plan, patients),
    )


def require_permitted(
    folder: SiteFolder, plan: StudyPlan, key: SigningKey, patients: int | None = None
) -> None:
    """Hold a plan against the hospital's policy; a refusal is audited.

    Raises:
        PrivacyError: a rule forbids it.
        DataError: the policy cannot be read.
    """
    try:
        authorise(load_policy(folder.policy), plan, patients)
    except PrivacyError as error:
        _audit_refusal(folder, plan, key, "policy", error)
        raise


def approve(
    folder: SiteFolder,
    study: str,
    chosen: CohortRecord,
    key: SigningKey,
    *,
    any_later_sites: bool,
    by: str,
    cohort: Cohort | None = None,
    now: Callable[[], str] = utc_now,
) -> Approval:
    """Approve the plan with these data and the list of sites as it stands.

    Args:
        chosen: the record of the data.
        cohort: what the record is of, where it was just looked at; else it is read again, once,
            for a plan with a guarantee and where it was never noted whom the plan may train on.

    Raises:
        PrivacyError: a rule of the hospital's forbids it, or its ledger has no room for it.
        DataError: the data changed since the record.
        TrustError: the list of sites has expired, or a file was edited; the ledger too.
        StorageError: it could not be stored: nothing new is approved.
    """
    bundle = pinned_bundle(folder, study)
    lists = lists_of(folder, bundle)
    roll = lists.current.roll
    if roll.expires < datetime.fromisoformat(now()):
        raise TrustError(
            f"the list of sites of {study} expired on {roll.valid_until}: ask the consortium for a "
            "renewed bundle and join with it"
        )
    noted = None if cohort is not None else noted_before(folder, key, chosen.digest)
    if cohort is None and (noted is None or bundle.plan.private is not None):
        cohort = _read_again(folder, bundle.plan, chosen, key, now)
    patients = _training_patients(folder, bundle.plan, chosen, cohort, key, now)
    require_permitted(folder, bundle.plan, key, patients)
    if bundle.plan.private is not None:
        assert cohort is not None  # it was read again above
        _register(folder, bundle.plan, cohort, key, now)
    if cohort is not None:
        noted = keep_note(folder, key, cohort.split("train").patients)
    approval = Approval(
        site=bundle.site,
        study=study,
        plan=bundle.plan.digest,
        roll=roll.digest,
        any_later_sites=any_later_sites,
        cohort=chosen.digest,
        when=now(),
        by=by,
    ).signed(key)
    write_note(folder.cohort(study), chosen)
    record(
        folder,
        key,
        "plan_approved",
        now,
        study=study,
        plan=approval.plan,
        roll=approval.roll,
        version=roll.version,
        cohort=approval.cohort,
        trained_on=noted,
        any_later_sites=any_later_sites,
        by=by,
    )
    write_note(folder.approval(study), approval)
    if lists.offered is not None:
        study_key = VerifyKey.from_text(bundle.study_key)
        own = own_identity(folder)
        take_roll(folder, study, lists.offered, key=study_key, own=own, approval=None)
    return approval


def refuse(
    folder: SiteFolder,
    study: str,
    reason: str,
    key: SigningKey,
    now: Callable[[], str] = utc_now,
) -> bool:
    """Say no to a plan.

    Returns:
        Whether an earlier approval was taken back.

    Raises:
        DataError: the study was not joined.
        TrustError: it was refused, but the ledger is not what it was: what the study had not spent
            is not free yet.
    """
    plan = pinned_bundle(folder, study).plan
    before = folder.approval(study).exists()
    with as_owner_of(folder.studies):
        folder.approval(study).unlink(missing_ok=True)
    record(folder, key, "plan_refused", now, study=study, plan=plan.digest, reason=reason)
    if plan.private is not None:
        close_register(folder, study, "the plan was refused", key, now)
    return before


def _training_patients(
    folder: SiteFolder,
    plan: StudyPlan,
    chosen: CohortRecord,
    cohort: Cohort | None,
    key: SigningKey,
    now: Callable[[], str],
) -> int:
    """How many of the chosen patients can be trained on; a refusal is audited."""
    from sites.ledger import training_patients

    try:
        with as_owner_of(folder.trainer):
            return training_patients(folder, plan, chosen, cohort, key, now)
    except (DataError, TrustError) as error:
        _audit_refusal(folder, plan, key, "ledger", error, now)
        raise


def _register(
    folder: SiteFolder,
    plan: StudyPlan,
    cohort: Cohort,
    key: SigningKey,
    now: Callable[[], str],
) -> None:
    """Register a private plan's patients; a refusal is audited."""
    from sites import ledger

    try:
        with as_owner_of(folder.trainer):
            ledger.register(folder, plan, cohort, key, now)
    except (PrivacyError, PlanError, DataError, TrustError) as error:
        _audit_refusal(folder, plan, key, "ledger", error, now)
        raise


def _read_again(
    folder: SiteFolder,
    plan: StudyPlan,
    chosen: CohortRecord,
    key: SigningKey,
    now: Callable[[], str],
) -> Cohort:
    """The cohort of a record that was frozen before; a refusal is audited."""
    from sites.cohort import recorded_cohort

    try:
        with as_owner_of(folder.trainer):
            return recorded_cohort(folder.record.name, plan, chosen)
    except DataError as error:
        _audit_refusal(folder, plan, key, "data", error, now)
        raise


def _audit_refusal(
    folder: SiteFolder,
    plan: StudyPlan,
    key: SigningKey,
    code: str,
    error: FedsegError,
    now: Callable[[], str] = utc_now,
) -> None:
    """Record why the hospital's own rules or books say no."""
    record(
        folder,
        key,
        "plan_refused",
        now,
        study=plan.study,
        plan=plan.digest,
        code=code,
        reason=f"{error}",
    )
