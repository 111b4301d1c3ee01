"""The coordinator's Flower ServerApp. Flower's words end here."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp


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
