"""Sites and coordinators with keys in memory, for tests of trust."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedseg.security.envelope import seal_bytes
from fedseg.security.identity import Roll, SiteIdentity
from fedseg.security.keys import ReceivingKey, SigningKey

NOW = "2026-05-03T12:00:00+00:00"
LATER = "2027-05-03T12:00:00+00:00"
STUDY, PLAN, ROLL = "tiny", "a" * 64, "b" * 64


def node_line() -> str:
    """The public line of a new node key."""
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@dataclass(frozen=True)
class Party:
    """Somebody with keys of all kinds."""

    name: str
    signing: SigningKey = field(default_factory=SigningKey.generate)
    receiving: ReceivingKey = field(default_factory=ReceivingKey.generate)
    node: str = field(default_factory=node_line)

    @property
    def identity(self) -> SiteIdentity:
        """What others know of a site."""
        return SiteIdentity(
            name=self.name,
            signing=self.signing.public.text,
            sealing=self.receiving.public.text,
            node=self.node,
        )


def roll_of(*parties: Party, **changes: Any) -> Roll:
    """A roll with these sites."""
    sites = tuple(sorted((party.identity for party in parties), key=lambda site: site.name))
    fields = {"study": STUDY, "version": 1, "issued": NOW, "valid_until": LATER, "sites": sites}
    return Roll.model_validate({**fields, **changes})


def task_envelope(plain: bytes, author: Party, /, *readers: Party, **changes: Any) -> bytes:
    """A task from a coordinator, sealed for some sites."""
    fields = {
        "kind": "task",
        "study": STUDY,
        "plan": PLAN,
        "roll": ROLL,
        "about": hashlib.sha256(plain).hexdigest(),
        "sender": "coordinator",
        "recipients": {reader.name: reader.receiving.public for reader in readers},
        "signer": author.signing,
        "reply_to": author.receiving.public,
    }
    return seal_bytes(plain, **{**fields, **changes})


def answer_envelope(plain: bytes, author: Party, coordinator: Party, /, **changes: Any) -> bytes:
    """A site's answer, sealed for the coordinator."""
    fields = {
        "kind": "answer",
        "about": "c" * 64,
        "sender": author.name,
        "recipients": {"coordinator": coordinator.receiving.public},
        "reply_to": None,
    }
    return task_envelope(plain, author, **{**fields, **changes})
