"""The shell of every command line: messages without tracebacks, and bugs with theirs."""

from __future__ import annotations

import pytest
import typer

from fedseg.errors import DataError
from fedseg.shell import run


def raising(error: BaseException) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def work() -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (DataError("a [bold] word"), 1, "a [bold] word"),
        (PermissionError(13, "no", "/srv/site/run/daemon.pid"), 1, "no right to daemon.pid: run"),
        (ModuleNotFoundError("no", name="torch.nn"), 1, "'torch', which is not installed"),
        (ModuleNotFoundError("no", name="torch.nn"), 1, "pip install 'fedseg[site]'"),
    ],
)
def test_what_the_user_can_mend_is_one_message(
    error: Exception,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["fedseg"])
    with pytest.raises(SystemExit) as stop:
        run(raising(error), extra="site")
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (status, "")
    assert words in err and "Traceback" not in err


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), ModuleNotFoundError("no", name="fedseg.none")]
)
def test_our_own_mistakes_keep_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fedseg"])
    with pytest.raises(type(error)):
        run(raising(error), extra="site")
