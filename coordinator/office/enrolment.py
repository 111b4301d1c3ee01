"""Enrolment: the signed roll of a study's sites, and the bundles that tell each of them.

`registry.json` is the truth about who takes part; whoever speaks to Flower follows it. Every change
raises its version, and its version never goes back: the audit remembers the last one, so that an
old registry put in the place of a new one, and with it a revoked site, is refused. The registry is
written first, then the bundles, then the audit; a crash between them is mended by the next change,
which any command here begins with. Only a holder of the study key gets this far.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path

from pydantic import ValidationError

from coordinator.folder import StudyFolder, read_part
from coordinator.office.audit import rolls_named
from coordinator.office.founding import MAX_PEM_BYTES, ROLL_DAYS, certify, study_fingerprint
from coordinator.office.registry import registry_of
from fedseg.chain import Chain, Entry, Fact, verify_chain
from fedseg.durable import write_atomically
from fedseg.errors import DataError, TrustError
from fedseg.security.documents import stamp
from fedseg.security.identity import (
    Revoked,
    Roll,
    SignedRoll,
    SiteIdentity,
    make_bundle,
    open_request,
    sign_roll,
)
from fedseg.security.keys import SigningKey

MAX_REASON = 500


def register(folder: StudyFolder, request: bytes, key: SigningKey, now: datetime) -> Path:
    """Enrol the site that made a request, or renew the bundle of one that is enrolled.

    All bundles are written anew, so that those sent after the last enrolment hold the same roll.

    Args:
        folder: the study's.
        request: as the site sent it; it must be signed by the site's own key.
        key: the study's.
        now: in UTC.

    Returns:
        The bundle that is to be sent to the site.

    Raises:
        TrustError: the request is not what it claims, its name or one of its keys belongs to
            another site, or it was revoked.
    """
    identity = open_request(request).identity
    with _changing(folder, key, now) as roll:
        refuse_clash(roll, identity)
        if roll.site(identity.name) is None:
            sites = tuple(sorted((*roll.sites, identity), key=lambda site: site.name))
            _put(folder, _next(roll, now, sites=sites), key, now, "enrolled", identity.name)
        else:
            _write_bundles(folder, sign_roll(roll, key), key, now)
            _record(folder, roll, key, now, "renewed", site=identity.name, reason="bundle")
    return folder.bundle(identity.name)


def refuse_clash(roll: Roll, identity: SiteIdentity) -> None:
    """A name or a key belongs to one site, once.

    Raises:
        TrustError: the name is another site's, or one of the keys is, or was revoked; a site that
            is on the roll as it is here passes.
    """
    name = identity.name
    if any(gone.signing == identity.signing for gone in roll.revoked):
        raise TrustError(
            f"the keys in the request of {name} were revoked: the site has to make new ones, with "
            "`fedseg-site init` in a new folder"
        )
    enrolled = roll.site(name)
    if enrolled is not None and enrolled != identity:
        raise TrustError(
            f"{name} is enrolled with other keys ({enrolled.fingerprint}) than the request has "
            f"({identity.fingerprint}); if the site has really made new ones, run "
            f"`fedseg-coordinator revoke {name} --reason ...` first and enrol it again"
        )
    for other in roll.sites:
        if other.name != name and other.name.lower() == name.lower():
            raise TrustError(
                f"{name} differs from {other.name} by capital letters only, which people and some "
                "file systems do not see: one of them needs another name"
            )
        if other.name != name and set(identity.keys) & set(other.keys):
            raise TrustError(
                f"the request of {name} holds a key of {other.name}: every site makes its own, "
                "with `fedseg-site init`"
            )


def revoke(folder: StudyFolder, site: str, reason: str, key: SigningKey, now: datetime) -> None:
    """Take a site out of the roll; its keys never come back, its name may with new ones.

    Raises:
        DataError: no such site is enrolled, or there is no reason.
    """
    _check_reason(reason)
    with _changing(folder, key, now) as roll:
        identity = roll.site(site)
        if identity is None:
            enrolled = ", ".join(one.name for one in roll.sites) or "none yet"
            raise DataError(f"{site!r} is not enrolled; enrolled are: {enrolled}")
        gone = Revoked(name=identity.name, signing=identity.signing)
        sites = tuple(one for one in roll.sites if one.name != site)
        changed = _next(roll, now, sites=sites, revoked=(*roll.revoked, gone))
        _put(folder, changed, key, now, "revoked", site, reason=reason)


def renew(
    folder: StudyFolder, key: SigningKey, now: datetime, passphrase: bytes | None = None
) -> None:
    """A new server key and certificate, a roll that is valid anew, and bundles that carry it.

    Raises:
        TrustError: the authority's key cannot be used.
    """
    with _changing(folder, key, now) as roll:
        certify(folder, folder.settings().host, now, passphrase)
        _put(folder, _next(roll, now), key, now, "renewed", reason="certificate and roll")


def declare_restored(
    folder: StudyFolder, reason: str, above: int, key: SigningKey, now: datetime
) -> int:
    """Record that a backup was put back, and raise the roll above every version that was out.

    Sites refuse a roll older than the one they hold, and so does this module.

    Args:
        reason: who restored what, and why.
        above: the highest version that any site has seen, where the audit was restored too.

    Returns:
        The roll's new version.

    Raises:
        DataError: there is no reason.
        TrustError: registry or audit are not the study's.
    """
    _check_reason(reason)
    with _locked(folder):
        roll = registry_of(folder, key.public).read().roll
        entries = verify_chain(folder.audit, key.public)
        _check_founding(folder, entries)
        highest = max(above, roll.version, max(rolls_named(entries))[0])
        changed = _next(roll, now, version=highest + 1)
        _put(folder, changed, key, now, "restored", reason=reason)
    return changed.version


@contextmanager
def _changing(folder: StudyFolder, key: SigningKey, now: datetime) -> Iterator[Roll]:
    """The roll, for one command alone, once it is seen to be the newest."""
    with _locked(folder):
        roll = registry_of(folder, key.public).read().roll
        entries = verify_chain(folder.audit, key.public)
        _check_founding(folder, entries)
        version, digest = max(rolls_named(entries))
        if roll.version < version or (roll.version == version and roll.digest != digest):
            raise TrustError(
                f"registry.json has version {roll.version} of the roll, the audit knows another "
                f"version {version}: put the newer file back, or, where a backup was restored, say "
                "so with `fedseg-coordinator backup restored`"
            )
        if roll.version > version:  # a crash came between the registry and what follows it
            _write_bundles(folder, sign_roll(roll, key), key, now)
            names = [site.name for site in roll.sites]
            _record(folder, roll, key, now, "renewed", reason="after a crash", sites=names)
        yield roll


def _check_founding(folder: StudyFolder, entries: Sequence[Entry]) -> None:
    """Plan, authority and study are those of `init`: what is signed here is not read unseen."""
    facts = entries[0].facts if entries else {}
    if (folder.plan().digest, study_fingerprint(folder)) != (
        facts.get("plan"),
        facts.get("fingerprint"),
    ):
        raise TrustError(
            "plan.json, ca.crt or the study's name is not what the audit says the study was "
            "founded with: put the files of `fedseg-coordinator init` back"
        )


@contextmanager
def _locked(folder: StudyFolder) -> Iterator[None]:
    """One change of the registry at a time."""
    folder.run.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder.registry_lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_reason(reason: str) -> None:
    """A reason is a sentence of people, for people."""
    if not reason.strip() or len(reason) > MAX_REASON or not reason.isprintable():
        raise DataError(f"a reason is one line of at most {MAX_REASON} letters: say why")


def _next(roll: Roll, now: datetime, **changes: object) -> Roll:
    """The roll's next version, valid from now on."""
    times = {"issued": stamp(now), "valid_until": stamp(now + timedelta(days=ROLL_DAYS))}
    values = {**dict(roll), "version": roll.version + 1, **times, **changes}
    try:
        return Roll.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DataError(f"the roll cannot be changed like this: {first['msg']}") from None


def _put(
    folder: StudyFolder,
    roll: Roll,
    key: SigningKey,
    now: datetime,
    event: str,
    site: str | None = None,
    **facts: str,
) -> None:
    """Make a roll the current one: registry, bundles, audit, in this order."""
    signed = sign_roll(roll, key)
    write_atomically(folder.registry, signed.canonical_bytes + b"\n")
    _write_bundles(folder, signed, key, now)
    identity = roll.site(site) if site else None
    if identity:
        facts["fingerprint"] = identity.fingerprint
    _record(folder, roll, key, now, event, **({"site": site} if site else {}), **facts)


def _record(
    folder: StudyFolder, roll: Roll, key: SigningKey, now: datetime, event: str, **facts: Fact
) -> None:
    """Say in the audit what happened, and which roll is the current one since."""
    chain = Chain(folder.audit, key, lambda: stamp(now))
    chain.append(event, **facts, version=roll.version, roll=roll.digest)


def _write_bundles(folder: StudyFolder, signed: SignedRoll, key: SigningKey, now: datetime) -> None:
    """One bundle for each site of the roll, and none for anybody else."""
    settings, plan = folder.settings(), folder.plan()
    folder.bundles.mkdir(mode=0o700, exist_ok=True)
    for path in folder.bundles.glob("*.json"):
        if signed.roll.site(path.stem) is None:
            path.unlink()
    for identity in signed.roll.sites:
        bundle = make_bundle(
            key,
            site=identity.name,
            address=settings.address,
            ca=read_part(folder.ca_certificate, MAX_PEM_BYTES),
            plan=plan,
            roll=signed,
            flower=metadata.version("flwr"),
            issued=stamp(now),
        )
        write_atomically(folder.bundle(identity.name), bundle)
