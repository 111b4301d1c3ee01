"""A hospital's consent that its own model is measured at the other hospitals of a study.

Its own model is the last shared one with the hospital's last update. The consent names that model
by its digest and is signed by the hospital: whoever is asked to measure a model under a hospital's
name can see that this very model was let go by it, and the coordinator can make no consent itself.
It is given with the update, for one study and one plan; what was let go cannot be called back.
"""

from __future__ import annotations

from typing import Literal

from fedseg.errors import TrustError
from fedseg.frozen import Digest, Frozen, Name, SiteName
from fedseg.security.documents import UNSIGNED, Signature, from_text, signable, to_text
from fedseg.security.keys import SIGNATURE_BYTES, SigningKey, VerifyKey

_CONTEXT = "consent"


class Consent(Frozen):
    """One hospital lets its own model go to the sites of one study.

    Attributes:
        plan: digest of the study's plan.
        site: whose model it is.
        model: digest of all tensors of that model.
        signature: of the hospital's signing key over all else; `UNSIGNED` in a simulation, where
            nobody has keys.
    """

    format: Literal["fedseg-consent/1"] = "fedseg-consent/1"
    study: Name
    plan: Digest
    site: SiteName
    model: Digest
    signature: Signature = UNSIGNED

    def signed(self, key: SigningKey) -> Consent:
        """The same consent with the hospital's signature."""
        signature = to_text(key.sign(_CONTEXT, signable(self)))
        return self.model_copy(update={"signature": signature})

    def require_signed(self, key: VerifyKey) -> None:
        """Check who gave it.

        Args:
            key: of the hospital that it names, from a list of sites that is trusted.

        Raises:
            TrustError: that hospital did not sign it.
        """
        try:
            signature = from_text(self.signature, SIGNATURE_BYTES, "the signature")
            key.verify(_CONTEXT, signable(self), signature)
        except TrustError:
            raise TrustError(
                f"{self.site} has not consented that this model is measured elsewhere: the "
                "consent is not signed by its key"
            ) from None
