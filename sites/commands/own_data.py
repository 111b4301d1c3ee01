"""Whose patients a command works on: a site's approved ones, or those of a folder that is named."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sites.commands.options import open_site
from sites.folder import SiteFolder
from sites.keyring import open_signing_key

if TYPE_CHECKING:
    from sites.heldback import House

TableOption = Annotated[
    str | None, typer.Option(help="CSV in the data folder to use instead of sites.csv.")
]
RowOption = Annotated[
    str | None, typer.Option(help="What the data call this hospital, where they name several.")
]
CacheOption = Annotated[
    Path | None, typer.Option(help="Keep prepared cases here, where there is no site.")
]


def house_at(site: Path, data: Path | None) -> House | None:
    """The hospital whose folder this is, or None for a researcher with a data folder.

    Raises:
        DataError: it is no site's folder, and no data are named.
    """
    from sites.heldback import House

    if data is not None and not SiteFolder(site).site.exists():
        return None
    folder = open_site(site)
    return House(folder, open_signing_key(folder))


def cache_or_temporary(cache: Path | None, stack: ExitStack) -> Path:
    """Where prepared cases are kept: where it was said, or until the stack is left."""
    if cache is not None:
        return cache
    temporary = tempfile.TemporaryDirectory(prefix="fedseg-cache-")
    return Path(stack.enter_context(temporary)) / "cache"
