"""What was joined: Flower's version, the plan under the hospital's policy, the frozen data, dates.

Why data no longer hold may name cases, so that reason is never repeated here: the doctor says that
they changed, and which command shows what.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from importlib.metadata import version

from fedseg.errors import FedsegError
from fedseg.plan import load_plan
from fedseg.security.certificates import EXPIRY_NOTICE
from fedseg.security.identity import Roll
from fedseg.security.keys import VerifyKey
from sites.approval import approved, frozen_record
from sites.checkup.machine import size_of_files
from sites.checkup.verdict import Verdict, fail, warn, well
from sites.enrolment import pinned_bundle
from sites.folder import SiteFolder
from sites.policy import authorise, load_policy
from sites.rolls import accepted_roll

Now = Callable[[], datetime]


def flower(folder: SiteFolder, study: str) -> Verdict:
    """Flower here and at the coordinator, which must be of one minor version."""
    subject, here, there = f"Flower ({study})", version("flwr"), pinned_bundle(folder, study).flower
    if _minor(here) != _minor(there):
        return fail(
            subject,
            f"{here} here, {there} at the coordinator when it wrote the bundle",
            "install the fedseg that the consortium uses; they can say which",
        )
    if here != there:
        return warn(
            subject,
            f"{here} here, {there} at the coordinator when it wrote the bundle",
            "nothing now; install the same fedseg at the next occasion",
        )
    return well(subject, f"{here}, as at the coordinator")


def permission(folder: SiteFolder, study: str) -> Verdict:
    """Whether the hospital approved the plan, and its policy allows it."""
    subject, plan = f"Approval ({study})", load_plan(folder.plan(study))
    approval = approved(folder, study)
    if approval is None or approval.plan != plan.digest:
        return warn(
            subject,
            "the plan is not approved: nothing is trained",
            f"`fedseg-site plan show {study}`, then `plan approve` or `plan refuse`",
        )
    try:
        chosen = frozen_record(folder, study, plan.digest)
        authorise(
            load_policy(folder.policy), plan, chosen.patients.get("train", 0) if chosen else None
        )
    except FedsegError as error:
        return fail(subject, str(error), "nothing is trained before one of the two changes")
    if folder.offered_roll(study).exists() and not approval.any_later_sites:
        return fail(
            subject,
            "sites were added since: nothing is trained before the hospital accepts them",
            f"`fedseg-site plan show {study}`, then `plan approve` again",
        )
    return well(subject, f"plan {plan.digest[:12]} is approved, and policy.yaml allows it")


def roll(folder: SiteFolder, study: str, now: Now) -> Verdict:
    """How long the list of sites is valid."""
    subject = f"List of sites ({study})"
    key = VerifyKey.from_text(pinned_bundle(folder, study).study_key)
    return lasting(subject, accepted_roll(folder, study, key).roll, now)


def lasting(subject: str, found: Roll, now: Now) -> Verdict:
    """A list and its date."""
    left = found.expires - now()
    remedy = "remind the consortium: `fedseg-coordinator renew`; the new list comes by itself"
    if left <= timedelta(0):
        return fail(subject, f"it ended on {found.expires:%Y-%m-%d}: nothing is trained", remedy)
    if left < EXPIRY_NOTICE:
        return warn(subject, f"ends on {found.expires:%Y-%m-%d}, in {left.days} days", remedy)
    return well(subject, f"version {found.version}, until {found.expires:%Y-%m-%d}")


def data(folder: SiteFolder, study: str, sizes: dict[str, int]) -> Verdict:
    """Whether the data are still those that were approved, to the last byte.

    Args:
        sizes: study -> bytes of its images; filled in where they were counted.
    """
    from sites.cohort import load_cohort, load_record

    subject, plan = f"Data ({study})", load_plan(folder.plan(study))
    if approved(folder, study) is None:
        return warn(subject, "none are chosen: the plan is not approved", "approve the plan first")
    record = load_record(folder, study, plan)
    try:
        cohort = load_cohort(folder, study, plan)
    except FedsegError:
        return fail(
            subject,
            "they cannot be read, or are not those that were approved: nothing is trained",
            f"`fedseg-site check` on the folder shows what changed; then `plan approve {study}`",
        )
    sizes[study] = size_of_files(path for case in cohort.cases for path in case.images)
    count = record.patients.get("train", 0)
    return well(subject, f"as approved, {count} patients to train on")


def _minor(text: str) -> tuple[str, ...]:
    """Major and minor number."""
    return tuple(text.split(".")[:2])
