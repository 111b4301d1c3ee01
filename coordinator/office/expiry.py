"""What ends, and when: said 30 days ahead, so that a study does not stop over a date."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from coordinator.folder import StudyFolder, read_part
from coordinator.office.founding import MAX_PEM_BYTES
from coordinator.office.registry import current_roll
from fedseg.security.certificates import EXPIRY_NOTICE, expiry

_RENEW = "run `fedseg-coordinator renew`"
_NEW_AUTHORITY = "the study has to be founded anew, and every site has to join again"


def warnings(folder: StudyFolder, now: datetime) -> tuple[str, ...]:
    """One sentence for each certificate or roll that ends within 30 days, or has ended.

    Args:
        folder: the study's.
        now: in UTC.

    Raises:
        TrustError: the registry was not signed by the study key, or a certificate is none.
        DataError: a file of the folder cannot be read.
    """
    ends = (
        ("the server's certificate", _end_of(folder.server_certificate), _RENEW),
        ("the roll of sites", valid_until(folder), _RENEW),
        ("the consortium's certificate authority", _end_of(folder.ca_certificate), _NEW_AUTHORITY),
    )
    return tuple(
        _warning(what, end, now, remedy) for what, end, remedy in ends if end - now < EXPIRY_NOTICE
    )


def valid_until(folder: StudyFolder) -> datetime:
    """When the roll ends, for every site of it."""
    return current_roll(folder).roll.expires


def _end_of(certificate: Path) -> datetime:
    """When a certificate's file ends."""
    return expiry(read_part(certificate, MAX_PEM_BYTES))


def _warning(what: str, end: datetime, now: datetime, remedy: str) -> str:
    """One sentence."""
    if end <= now:
        return f"{what} ended on {end:%Y-%m-%d}: {remedy}"
    return f"{what} ends on {end:%Y-%m-%d}, in {(end - now).days} days: {remedy}"
