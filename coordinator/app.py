"""The coordinator's Flower ServerApp. Flower's words end here.

`app` is what the thin app of a deployment names. Which study it serves is said by the environment
that the daemon gave the SuperLink, never by a run's configuration, which anybody could have sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedseg.errors import DataError
from fedseg.offspring import die_with_parent

STUDY_VARIABLE = "FEDSEG_STUDY"


def make_app(run_study: Callable[[Grid], None]) -> ServerApp:
    """A ServerApp whose whole work is one study.

    Args:
        run_study: takes Flower's Grid and returns when the study is finished.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _context: Context) -> None:
        run_study(grid)

    return app


def serve_study(grid: Grid) -> None:
    """Serve the study that the environment names, in a process that ends with its parent.

    Raises:
        DataError: no study is named.
    """
    from coordinator.folder import open_study
    from coordinator.running.service import serve

    die_with_parent()
    named = os.environ.get(STUDY_VARIABLE)
    if not named:
        raise DataError(f"{STUDY_VARIABLE} names no study: start it with `fedseg-coordinator run`")
    serve(grid, open_study(named))


app = make_app(serve_study)
