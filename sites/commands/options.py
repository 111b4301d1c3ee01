"""What several commands of `fedseg-site` ask for in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sites.folder import SiteFolder

SiteOption = Annotated[
    Path,
    typer.Option("--site", envvar="FEDSEG_SITE", metavar="SITEDIR", help="This site's folder."),
]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="The study's name.")]
HERE = Path()


def open_site(path: Path) -> SiteFolder:
    """The folder of a site that `fedseg-site init` has made.

    Raises:
        DataError: it is none.
    """
    folder = SiteFolder(path)
    folder.record  # noqa: B018  raises where it is none
    return folder
