"""What a hospital approved: one plan, one list of sites, one cohort; signed by itself.

An approval is of a plan's digest, never of a study's name. It is signed with the site's key, so
that a file that was edited, or came from another site's backup, is refused instead of believed.
Approving writes the cohort first and the approval last: before that nothing is trained, whatever
the crash.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import Field

from fedseg.errors import TrustError
from fedseg.frozen import Digest, Frozen, Name, SiteName
from fedseg.security.documents import (
    UNSIGNED,
    Moment,
    Signature,
    from_text,
    signable,
    to_text,
)
from fedseg.security.keys import SIGNATURE_BYTES, SigningKey, VerifyKey
from fedseg.updates import NotNegativeInt, SplitName
from sites.folder import SiteFolder
from sites.keyring import own_identity
from sites.notes import read_note

CONTEXT = "approval"


class CohortRecord(Frozen):
    """cohort.json: which data a study may train on. It names cases and stays with the trainer.

    Attributes:
        data: the data folder, absolute.
        table: the CSV in it, or None for the usual one.
        row: what the data call this site; "" where they name no sites.
        cases: names of the usable cases, sorted.
        patients: patients of them by split.
        left_out: cases of this site that cannot be used.
        unlisted: rows or files of the folder that could not even be listed as cases.
        fingerprint: over patients, splits, label map, declared labels and files.
        annotated: the plan's labels that the hospital declares to annotate; None is all of them.
    """

    format: Literal["fedseg-cohort/1"] = "fedseg-cohort/1"
    plan: Digest
    data: str
    table: str | None
    row: str
    cases: tuple[str, ...]
    patients: dict[SplitName, NotNegativeInt]
    left_out: NotNegativeInt
    unlisted: NotNegativeInt
    fingerprint: Digest
    annotated: tuple[str, ...] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the record, which the approval names."""
        return hashlib.sha256(self.canonical_bytes).hexdigest()


class Approval(Frozen):
    """approval.json.

    Attributes:
        plan: digest of the plan.
        roll: digest of the list of sites that was accepted with it.
        any_later_sites: sites that are added later need no approval of their own.
        cohort: digest of cohort.json.
        when: ISO 8601, UTC.
        by: who approved, as they call themselves.
        signature: of this site's signing key over all else.
    """

    format: Literal["fedseg-approval/1"] = "fedseg-approval/1"
    site: SiteName
    study: Name
    plan: Digest
    roll: Digest
    any_later_sites: bool
    cohort: Digest
    when: Moment
    by: Annotated[str, Field(max_length=200)]
    signature: Signature = UNSIGNED

    def signed(self, key: SigningKey) -> Approval:
        """The same approval with this site's signature."""
        signature = to_text(key.sign(CONTEXT, signable(self)))
        return self.model_copy(update={"signature": signature})


def approved(folder: SiteFolder, study: str) -> Approval | None:
    """What this site approved of a study, or None where it has not.

    Raises:
        DataError: approval.json cannot be read.
        TrustError: it was edited, or is another site's or study's.
    """
    path = folder.approval(study)
    if not path.exists():
        return None
    approval, own = read_note(path, Approval), own_identity(folder)
    wrong = TrustError(
        f"{path.name} of {study} was not written by `plan approve` at this site, or was edited "
        f"since: nothing is trained; look at the audit, then `fedseg-site plan approve {study}`"
    )
    if (approval.site, approval.study) != (own.name, study):
        raise wrong
    try:
        signature = from_text(approval.signature, SIGNATURE_BYTES, "the signature")
        VerifyKey.from_text(own.signing).verify(CONTEXT, signable(approval), signature)
    except TrustError:
        raise wrong from None
    return approval


def frozen_record(folder: SiteFolder, study: str, plan: str) -> CohortRecord | None:
    """The cohort that the approval of a plan (a digest) froze, or None where there is none.

    Raises:
        DataError: cohort.json cannot be read.
        TrustError: it is not the one that was approved, or the approval was edited.
    """
    approval = approved(folder, study)
    if approval is None or approval.plan != plan:
        return None
    record = read_note(folder.cohort(study), CohortRecord)
    if record.digest != approval.cohort or record.plan != plan:
        raise TrustError(
            f"cohort.json of {study} is not the one that was approved: look at the data with "
            "`fedseg-site check`, then `fedseg-site plan approve` with --data again"
        )
    return record
