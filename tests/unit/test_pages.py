"""The report in a real browser: it prints, and asks for nothing outside itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from study_results import make_overlays, make_result

from fedseg.reports.study import write_report

CHROMIUM = shutil.which("chromium")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: `make system` installs it")
def test_the_report_prints_to_pdf_in_a_real_browser(tmp_path: Path) -> None:
    result = make_result()
    page, printed = tmp_path / "report.html", tmp_path / "report.pdf"
    write_report(result, make_overlays(), page)
    command = [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={printed}"]
    done = subprocess.run(
        [str(CHROMIUM), *QUIET, *command, page.as_uri()],
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert printed.read_bytes().startswith(b"%PDF")
    assert printed.stat().st_size > 100_000
