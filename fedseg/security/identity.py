"""Who takes part: requests, the signed roll of a study, and the bundle that lets a site join.

A site makes its keys and signs a request with them, which proves that it holds them; nothing in it
is secret. The consortium compares the request's fingerprint by telephone and puts the site on the
roll: versioned, signed by the study key, valid for a time, with the keys of all sites. A bundle
brings one site all that it needs to join: address, CA, plan, roll and study key. A bundle proves
nothing by itself, because it brings the very key that signed it: the site compares its fingerprint
by telephone before it pins that key. From then on only that key counts.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Annotated, Literal, Self

from cryptography import x509
from pydantic import Field, model_validator

from fedseg.errors import TrustError
from fedseg.frozen import Frozen, Name, SiteName
from fedseg.plan import StudyPlan
from fedseg.security.documents import (
    UNSIGNED,
    Moment,
    Signature,
    from_text,
    moment,
    open_document,
    signable,
    to_text,
)
from fedseg.security.keys import (
    SIGNATURE_BYTES,
    SealingKey,
    SigningKey,
    VerifyKey,
    fingerprint,
)
from fedseg.security.nodekeys import check_public_line
from fedseg.strictyaml import MAX_BYTES as MAX_PLAN_BYTES

COORDINATOR = "coordinator"
MAX_SITES = 256
MAX_REQUEST_BYTES = 16 * 1024
MAX_ROLL_BYTES = 1024 * 1024
MAX_BUNDLE_BYTES = MAX_PLAN_BYTES + MAX_ROLL_BYTES + 64 * 1024
_REQUEST, _ROLL, _BUNDLE = "request", "roll", "bundle"

Address = Annotated[
    str, Field(pattern=r"^([A-Za-z0-9.-]{1,253}|\[[0-9a-f:.]{2,45}\]):[1-9]\d{0,4}$")
]


class SiteIdentity(Frozen):
    """A site's name and public keys: to verify it, to seal for it, and Flower's for its relay."""

    name: SiteName
    signing: Annotated[str, Field(max_length=64)]
    sealing: Annotated[str, Field(max_length=2048)]
    node: Annotated[str, Field(max_length=1024)]

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.name.lower() == COORDINATOR:
            raise ValueError("name: 'coordinator' is the coordinator's own name")
        try:
            VerifyKey.from_text(self.signing)
            SealingKey.from_text(self.sealing)
            check_public_line(self.node)
        except TrustError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def fingerprint(self) -> str:
        """To be compared by telephone before the site is enrolled."""
        return fingerprint(self.name, self.signing, self.sealing, self.node)

    @property
    def keys(self) -> tuple[str, str, str]:
        """All public keys."""
        return self.signing, self.sealing, self.node


class Request(Frozen):
    """A site asks to take part."""

    format: Literal["fedseg-request/1"] = "fedseg-request/1"
    identity: SiteIdentity
    created: Moment
    signature: Signature


class Revoked(Frozen):
    """A site that is no longer on the roll, and the key that no longer counts."""

    name: SiteName
    signing: Annotated[str, Field(max_length=64)]


class Roll(Frozen):
    """The sites of a study, as of one version."""

    format: Literal["fedseg-roll/1"] = "fedseg-roll/1"
    study: Name
    version: Annotated[int, Field(ge=1, lt=2**31)]
    issued: Moment
    valid_until: Moment
    sites: Annotated[tuple[SiteIdentity, ...], Field(max_length=MAX_SITES)] = ()
    revoked: Annotated[tuple[Revoked, ...], Field(max_length=4 * MAX_SITES)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [site.name for site in self.sites]
        folded = [name.lower() for name in names]
        if names != sorted(names) or len(set(folded)) != len(folded):
            raise ValueError("sites must be sorted by name, and each name may stand once")
        for kind in ("signing", "sealing", "node"):
            if len({getattr(site, kind) for site in self.sites}) != len(self.sites):
                raise ValueError(f"two sites have the same {kind} key")
        if {site.signing for site in self.sites} & {gone.signing for gone in self.revoked}:
            raise ValueError("a revoked key is on the roll: a site that comes back makes new keys")
        if moment(self.valid_until) <= moment(self.issued):
            raise ValueError("valid_until must be after issued")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes: what envelopes name."""
        return hashlib.sha256(self.canonical_bytes).hexdigest()

    @property
    def expires(self) -> datetime:
        """When the roll stops being valid."""
        return moment(self.valid_until)

    def site(self, name: str) -> SiteIdentity | None:
        """The site of that name, or None where it is not on the roll."""
        return next((site for site in self.sites if site.name == name), None)

    def added_since(self, other: Roll) -> tuple[str, ...]:
        """Names that an earlier roll has not, or has with other keys."""
        return tuple(site.name for site in self.sites if other.site(site.name) != site)


class SignedRoll(Frozen):
    """A roll and the study key's signature."""

    roll: Roll
    signature: Signature

    def verify(self, key: VerifyKey, study: str) -> None:
        """Accept the roll or raise.

        Raises:
            TrustError: not signed by the study key, or of another study.
        """
        key.verify(_ROLL, self.roll.canonical_bytes, _signature(self.signature))
        if self.roll.study != study:
            raise TrustError(f"the roll is of the study {self.roll.study!r}, not of {study!r}")


class Bundle(Frozen):
    """All that one site needs to join a study."""

    format: Literal["fedseg-bundle/1"] = "fedseg-bundle/1"
    study: Name
    site: SiteName
    address: Address
    ca: Annotated[str, Field(max_length=16 * 1024)]
    study_key: Annotated[str, Field(max_length=64)]
    plan: StudyPlan
    roll: SignedRoll
    flower: Annotated[str, Field(pattern=r"^[0-9][0-9A-Za-z.+-]{0,31}$")]
    issued: Moment
    signature: Signature

    @property
    def fingerprint(self) -> str:
        """To be compared by telephone before the study key and the CA are pinned."""
        return fingerprint(self.study, self.study_key, self.ca)


def make_request(identity: SiteIdentity, key: SigningKey, now: str) -> bytes:
    """Write a site's request, signed by the key that it names.

    Raises:
        ValueError: the key is not the one of the identity.
    """
    if key.public.text != identity.signing:
        raise ValueError("a request is signed by the key that it names")
    draft = Request(identity=identity, created=now, signature=UNSIGNED)
    return _sealed(draft, key, _REQUEST)


def open_request(data: bytes) -> Request:
    """Read a request; the sender holds the signing key that it names, more is not proven.

    Raises:
        TrustError: oversized, malformed, or not signed by its own key.
    """
    request = open_document(data, Request, max_bytes=MAX_REQUEST_BYTES, what="the request")
    key = VerifyKey.from_text(request.identity.signing)
    key.verify(_REQUEST, signable(request), _signature(request.signature))
    return request


def sign_roll(roll: Roll, key: SigningKey) -> SignedRoll:
    """Sign a roll with the study key."""
    return SignedRoll(roll=roll, signature=to_text(key.sign(_ROLL, roll.canonical_bytes)))


def open_roll(data: bytes, key: VerifyKey, study: str) -> SignedRoll:
    """Read a roll.

    Raises:
        TrustError: oversized, malformed, not signed by the study key, or of another study.
    """
    signed = open_document(data, SignedRoll, max_bytes=MAX_ROLL_BYTES, what="the roll")
    signed.verify(key, study)
    return signed


def make_bundle(
    key: SigningKey,
    *,
    site: str,
    address: str,
    ca: bytes,
    plan: StudyPlan,
    roll: SignedRoll,
    flower: str,
    issued: str,
) -> bytes:
    """Write what one site needs to join.

    Args:
        key: the study key.
        site: whom the bundle is for; it must be on the roll.
        address: where the coordinator is reached, "host:port".
        ca: the consortium's CA certificate, PEM.
        plan: the built plan.
        roll: the current roll.
        flower: the version of Flower that the coordinator runs.
        issued: now, ISO 8601 in UTC.
    """
    draft = Bundle(
        study=plan.study,
        site=site,
        address=address,
        ca=ca.decode("ascii"),
        study_key=key.public.text,
        plan=plan,
        roll=roll,
        flower=flower,
        issued=issued,
        signature=UNSIGNED,
    )
    return _sealed(draft, key, _BUNDLE)


def open_bundle(data: bytes, identity: SiteIdentity) -> Bundle:
    """Read a bundle at the site that it is for; its fingerprint is still to be compared.

    Raises:
        TrustError: oversized, malformed, not signed by the key that it brings, for another site, or
            its plan or roll are not this study's or do not have this site's keys.
    """
    bundle = open_document(data, Bundle, max_bytes=MAX_BUNDLE_BYTES, what="the bundle")
    key = VerifyKey.from_text(bundle.study_key)
    key.verify(_BUNDLE, signable(bundle), _signature(bundle.signature))
    bundle.roll.verify(key, bundle.study)
    if bundle.plan.study != bundle.study or bundle.plan.initial is None:
        raise TrustError("the bundle's plan is of another study or was not built: ask for another")
    if bundle.site != identity.name:
        raise TrustError(f"the bundle is for {bundle.site!r}, this site is {identity.name!r}")
    if bundle.roll.roll.site(identity.name) != identity:
        raise TrustError(
            "the bundle's roll has not this site's keys: send the consortium the request.json of "
            "this folder, and join with the bundle that answers it"
        )
    try:
        x509.load_pem_x509_certificate(bundle.ca.encode())
    except ValueError:
        raise TrustError("the bundle's CA is not a certificate: ask for another") from None
    return bundle


def _sealed(draft: Request | Bundle, key: SigningKey, context: str) -> bytes:
    """The canonical bytes of a document once it is signed."""
    signature = to_text(key.sign(context, signable(draft)))
    return draft.model_copy(update={"signature": signature}).canonical_bytes + b"\n"


def _signature(text: str) -> bytes:
    """The bytes of a signature."""
    return from_text(text, SIGNATURE_BYTES, "the signature")
