"""A Unix socket's address that the system takes, however long the path of its folder is.

A socket's address holds 107 bytes of path (unix(7), `sun_path`); a site's folder may lie deeper.
Then the folder is opened, and the socket is addressed through the open folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 107


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """What to bind or to connect to, for as long as the block lasts.

    Raises:
        OSError: the folder is not there, or this user may not pass through it.
    """
    if len(os.fsencode(path)) <= LONGEST:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
