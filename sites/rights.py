"""Who may look into a site's folders: what root does is done as the owner of where it is done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedseg.errors import StorageError

OPEN_FOLDER, SHARED_FOLDER, PRIVATE_FOLDER = 0o755, 0o750, 0o700


def make_folder(path: Path, mode: int = PRIVATE_FOLDER) -> Path:
    """Make a folder of this mode, for the owner of its parent; one that is there gets no wider.

    Raises:
        StorageError: no right to make it there.
    """
    try:
        with as_owner_of(path.parent):
            if not path.is_dir():
                path.mkdir(parents=True, mode=mode)
                path.chmod(mode)
            wider = path.stat().st_mode & 0o777 & ~mode
            if wider:
                path.chmod(path.stat().st_mode & mode)
    except OSError as error:
        raise StorageError(
            f"cannot make the folder {path.name} ({error.strerror}): run this as the user to whom "
            f"{path.parent.name} belongs, or as root"
        ) from None
    return path


@contextmanager
def as_owner_of(folder: Path) -> Iterator[None]:
    """As root, act with the rights of a folder's owner and no more; else as whoever one is.

    So what root writes belongs to the user that will need it, and a link that such a user lays
    leads nowhere that the user could not go alone: it counts as the user's, whatever it points to.
    For a process with one thread.
    """
    while not folder.exists():
        folder = folder.parent
    owner, groups, group = folder.lstat(), os.getgroups(), os.getegid()
    if owner.st_uid == 0:  # a folder, or a link that root has laid
        owner = folder.stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    os.setgroups([])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)
