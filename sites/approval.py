"""What a hospital approved: one plan, one list of sites, one cohort; signed by itself.

An approval is of a plan's digest, never of a study's name. It is signed with the site's key, so
that a file that was edited, or came from another site's backup, is refused instead of believed.
Approving writes the cohort first and the approval last: before that nothing is trained, whatever
the crash.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedseg.errors import TrustError
from fedseg.plan import Digest, Frozen, Name, SiteName
from fedseg.security.documents import Moment, Signature, from_text, signable, to_text
from fedseg.security.keys import SIGNATURE_BYTES, SigningKey, VerifyKey
from sites.folder import SiteFolder, read_note
from sites.keyring import own_identity

CONTEXT = "approval"
_PLACE = "A" * 86 + "=="  # stands where the signature will


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
    signature: Signature = _PLACE

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
