"""`fedseg-site check`: exit status, tables, JSON and the page."""

from __future__ import annotations

import base64
import json
import re
import stat
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from small_cases import HEADER, LPS, folder_of, image, label, save, task
from typer.testing import CliRunner

from fedseg.errors import DataError
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.check_page import render_check_page
from fedseg.imaging.manifests import survey
from fedseg.imaging.overlays import overlay_png
from fedseg.imaging.quality import inspect
from fedseg.imaging.volumes import Volume
from sites import cli


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    root = folder_of(tmp_path / "data", "a", "b", table=HEADER + "a,x,train,P1\nb,x,val,P2\n")
    save(root / "images" / "b.nii.gz", image() + 1)
    save(root / "labels" / "b.nii.gz", np.roll(label(), 1, 0))
    return root


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_a_healthy_folder_exits_with_zero(healthy: Path) -> None:
    status, text = run("check", healthy)
    assert status == 0
    assert "All is well: 2 patients, 2 cases." in text and "value_1" in text


def test_errors_and_warnings_exit_with_one_and_findings_come_first(healthy: Path) -> None:
    save(healthy / "labels" / "b.nii.gz", 0 * label())
    status, text = run("check", healthy)
    assert status == 1 and text.index("the label is empty") < text.index("Cohort")
    (healthy / "labels" / "b.nii.gz").unlink()
    status, text = run("check", healthy)
    assert status == 1 and "labels/b.nii.gz" in text and "1 error, 0 warnings" in text


def test_json_is_the_inspection_alone(healthy: Path) -> None:
    status, text = run("check", healthy, "--json")
    value = json.loads(text)
    assert status == 0 and value["ok"] and [row["case"] for row in value["table"]] == ["a", "b"]


def test_markup_and_control_characters_of_the_data_stay_text(healthy: Path) -> None:
    (healthy / "sites.csv").write_text(HEADER + "a,x,train,[bold]P1\x1b[2J\nb,x,val,P2\n")
    _, text = run("check", healthy)
    assert "[bold]P1" in text and "\x1b[2J" not in text


def test_a_table_can_be_named(healthy: Path) -> None:
    (healthy / "other.csv").write_text(HEADER + "a,y,train,P1\n")
    status, text = run("check", healthy, "--table", "other.csv")
    assert status == 1 and "no row of the table names" in text


def test_a_plan_is_checked_against(healthy: Path, tmp_path: Path) -> None:
    plan = {
        "study": "s",
        "task": task(labels=1).model_dump(mode="json") | {"patch_size": [16, 16, 16]},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(plan))
    status, text = run("check", healthy, "--plan", tmp_path / "study.yaml")
    assert status == 1 and "unexpected label value(s) 2" in text


def test_main_says_what_can_be_mended_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedseg-site", "check", str(tmp_path / "gone")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_main_names_a_missing_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], healthy: Path
) -> None:
    monkeypatch.setitem(sys.modules, "nibabel", None)
    monkeypatch.setattr(sys, "argv", ["fedseg-site", "check", str(healthy)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "pip install 'fedseg[site]'" in capsys.readouterr().err


def test_the_page_is_private_self_contained_and_escapes_names(healthy: Path) -> None:
    (healthy / "sites.csv").write_text(HEADER + "a,x,train,<script>P1\nb,x,val,P2\n")
    page = healthy.parent / "check.html"
    status, _ = run("check", healthy, "--html", page)
    text = page.read_text()
    assert status == 0 and stat.S_IMODE(page.stat().st_mode) == 0o600
    assert "<script" not in text and "&lt;script&gt;P1" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)|https?://|url\(""", text)
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', text)
    assert len(pictures) == 2 and pictures[0][1].startswith("a: axial, coronal and sagittal")
    assert base64.b64decode(pictures[0][0]).startswith(b"\x89PNG")
    for tag in ("table", "figure", "section", "main"):
        assert text.count(f"<{tag}") == text.count(f"</{tag}>")


def test_a_page_that_cannot_be_written_is_named(healthy: Path) -> None:
    with pytest.raises(DataError, match="cannot write the page"):
        run("check", healthy, "--html", healthy / "gone" / "check.html")


def test_the_page_shows_findings_and_unreadable_cases(healthy: Path) -> None:
    (healthy / "images" / "a.nii.gz").write_bytes(b"broken")
    manifest = survey(healthy, task())
    page = render_check_page(
        inspect(manifest, task()), manifest, task(), made_at=datetime(2026, 1, 2, tzinfo=UTC)
    )
    assert "1 error and 0 warnings" in page and "The image cannot be read" in page
    assert page.index("<figcaption>a<") < page.index("<figcaption>b<") and "2026-01-02" in page


def test_pictures_follow_the_patient_not_the_file() -> None:
    array = np.random.default_rng(0).random((1, 6, 8, 5)).astype(np.float32)
    mark = np.zeros((6, 8, 5), np.uint8)
    mark[4, 1:3, 2] = 1
    ras = Volume(array, mark, np.diag([1.0, 2.0, 3.0, 1.0]))
    lps = Volume(array[:, ::-1, ::-1].copy(), mark[::-1, ::-1].copy(), LPS)
    assert overlay_png(ras) == overlay_png(lps)
    assert overlay_png(ras) != overlay_png(Volume(array, mark, LPS))
    assert overlay_png(Volume(array, None, LPS), planar=True).startswith("data:image/png")


def test_the_commands_explain_themselves() -> None:
    for args, text in [
        (["--help"], "check"), (["check", "--help"], "Examples"),
        (["cache", "purge", "--help"], "cache purge"),
    ]:  # fmt: skip
        status, shown = run(*args)
        assert status == 0 and text in shown


def test_purge_says_what_was_freed(healthy: Path, tmp_path: Path) -> None:
    cache = CaseCache(tmp_path / "cache", task())
    for case in survey(healthy, task()).cases:
        cache.load(case, ())
    status, text = run("cache", "purge", tmp_path / "cache")
    assert status == 0 and re.search(r"0\.0 MB of prepared cases deleted", text)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    with pytest.raises(DataError, match="nothing was deleted"):
        run("cache", "purge", healthy)
