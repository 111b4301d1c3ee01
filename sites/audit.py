"""What a site writes into its audit, and as whom; see `fedseg.chain` for what that proves."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from fedseg.chain import Chain, Entry, Fact
from fedseg.errors import DataError
from fedseg.security.documents import stamp
from fedseg.security.keys import SigningKey
from sites.folder import SiteFolder
from sites.rights import as_owner_of


def utc_now() -> str:
    """ISO 8601 in UTC, to the second."""
    return stamp(datetime.now(UTC))


def record(
    folder: SiteFolder,
    key: SigningKey,
    event: str,
    now: Callable[[], str] = utc_now,
    **facts: Fact,
) -> Entry:
    """Append one entry to a site's audit; it is on disk when this returns.

    Raises:
        TrustError: the audit was changed: nothing is appended, and nothing should go on.
        StorageError: it cannot be written.
    """
    with as_owner_of(folder.trainer):
        return Chain(folder.audit, key, now).append(event, **facts)


def require_words(text: str, option: str) -> str:
    """Words for the audit: some, and not too many.

    Raises:
        DataError: empty, too long, or not printable.
    """
    if not text.strip() or len(text) > 500 or not text.isprintable():
        raise DataError(f"{option} needs 1 to 500 printable characters on one line")
    return text
