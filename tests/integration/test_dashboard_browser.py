"""The dashboard as people meet it: the real command, a real browser, a study that moves on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from small_plans import tiny_model
from small_studies import founded

from coordinator.folder import StudyFolder
from coordinator.progress.keeper import ProgressKeeper
from coordinator.rounds.events import SiteAnswered, StageClosed, StageOpened
from fedseg.aggregation.rounds import first_state
from fedseg.result import SiteAnswer, StageRecord

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: `make system` installs it"
)
SITES = ("hospital_a", "hospital_b", "klinikum_am_nordpark_radiologie")
LOOK = "document.getElementById('headline').textContent"


class Study:
    """A study whose document moves on as a real run moves it."""

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder
        state = first_state(folder.plan(), tiny_model())
        self._keeper = ProgressKeeper(folder.progress, folder.plan(), state, sites=SITES)
        self._keeper.seen(SITES, SITES)

    def open(self, round_: int, stage: str) -> None:
        self._keeper(StageOpened(round_, stage, 1, len(SITES)))  # type: ignore[arg-type]

    def close(self, round_: int, stage: str) -> None:
        scores = {"dice": {"anterior": 0.5 + 0.1 * round_}} if stage == "evaluate" else {}
        loss = 1.0 / round_ if stage == "train" else None
        answers = tuple(
            SiteAnswer(site=site, patients=4, loss=loss, scores=scores, bytes_up=1_000_000)
            for site in SITES
        )
        for answer in answers:
            self._keeper(SiteAnswered(round_, stage, answer))  # type: ignore[arg-type]
        record = StageRecord(
            round=round_,
            stage=stage,
            attempt=1,
            bytes_down=3_000_000,
            bytes_up=3_000_000,
            answers=answers,
            failures=(),
        )
        self._keeper(StageClosed(record, 12.0))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    folder, _ = founded(tmp_path / "study")
    made = Study(folder)
    made.open(1, "train")
    made.close(1, "train")
    made.open(1, "evaluate")
    made.close(1, "evaluate")
    made.open(2, "train")
    return made


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path / "profile") as tab:
        tab.size(1280, 900)
        yield tab


@contextmanager
def dashboard(study: Study, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command on a free port: its address, and its process."""
    program = str(Path(sys.executable).with_name("fedseg-coordinator"))
    process = subprocess.Popen(
        [program, "dashboard", "--study", str(study.folder.path), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert found, process.stdout.read()
        yield found.group(), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


def test_the_page_follows_the_study_and_loses_nothing_on_the_way(study: Study, page: Page) -> None:
    with dashboard(study) as (address, _):
        page.go(address)
        assert page.js(LOOK) == "Round 2 of 3: hospitals are training"
        page.until("document.getElementById('live').dataset.state === 'live'")
        page.js("document.getElementById('loss-numbers').querySelector('summary').focus()")
        page.js("document.getElementById('loss-numbers').open = true; window.same = true")
        study.close(2, "train")
        study.open(2, "evaluate")
        page.until(f"{LOOK} === 'Round 2 of 3: hospitals are measuring the model'")
        assert page.js("window.same") is True, "the page was not loaded again"
        assert page.js("document.getElementById('loss-numbers').open") is True
        assert page.js("document.activeElement.tagName") == "SUMMARY"
        assert page.js("document.getElementById('told').textContent").startswith("Round 2")
        assert {url.startswith(address) for url in page.asked} == {True}
        assert page.complaints == []


def test_the_page_can_reach_nothing_else(study: Study, page: Page) -> None:
    with dashboard(study) as (address, _), dashboard(study) as (other, _):
        page.go(address)
        page.js(f"fetch('{other}', {{mode: 'no-cors'}}).catch(() => {{ window.refused = true }})")
        page.until("window.refused")
        page.js(f"document.body.append(Object.assign(new Image(), {{src: '{other}x.png'}}))")
        page.js("document.body.insertAdjacentHTML('beforeend', '<b onclick=\"x()\">b</b>')")
        page.js("document.querySelector('b[onclick]').click()")
        page.until("true")
        assert sum("Content Security Policy" in text for text in page.complaints) >= 3


def test_it_is_worked_with_the_keyboard_alone(study: Study, page: Page) -> None:
    with dashboard(study) as (address, _):
        page.go(address)
        focused = []
        for _ in range(15):
            page.key("Tab", 9)
            focused.append(page.js("document.activeElement.textContent.trim().slice(0, 20)"))
        assert focused[0] == "Skip to the study"
        sections = ["Hospitals", "Worst", "Curves", "Rounds", "Failures", "Facts"]
        assert focused[1:7] == sections
        assert "The same in numbers" in focused
        page.js("document.querySelector('#dice-numbers summary').focus()")
        page.key("Enter", 13, "\r")
        page.until("document.getElementById('dice-numbers').open")
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.js(outline) == "solid"


def test_a_screen_reader_finds_its_way(study: Study, page: Page) -> None:
    with dashboard(study) as (address, _):
        page.go(address)
        roles = page.roles()
        kinds = {role for role, _ in roles}
        assert {"banner", "navigation", "main", "contentinfo", "progressbar", "status"} <= kinds
        named = {name for role, name in roles if role == "region"}
        assert {"Hospitals", "Learning curves", "Rounds", "Failures", "Facts"} <= named
        pictures = [name for role, name in roles if role in ("image", "img") and name]
        assert any(name.startswith("Dice on held-back patients by round") for name in pictures)
        assert next(name for role, name in roles if role == "heading").startswith("Round 2 of 3")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_small_screen(study: Study, page: Page, scheme: str) -> None:
    with dashboard(study) as (address, _):
        page.size(360, 740)
        page.colours(scheme)
        page.go(address)
        assert page.js("document.documentElement.scrollWidth") <= 360
        assert page.roles(), "folded tables keep their roles"
        assert sum(role == "row" for role, _ in page.roles()) >= len(SITES)
        small = "[...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && "
        small += "e.childNodes.length && parseFloat(getComputedStyle(e).fontSize) < 12).length"
        assert page.js(small) == 0
        assert page.js(CONTRASTS) == []


def test_without_scripts_it_still_tells_everything(study: Study, page: Page) -> None:
    with dashboard(study) as (address, _):
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.call("Page.navigate", url=address)
        page.call("Emulation.setScriptExecutionDisabled", value=False)
        page.until(f"document.readyState === 'complete' && {LOOK}.startsWith('Round 2')")


def test_when_the_dashboard_ends_the_page_says_so(study: Study, page: Page) -> None:
    with dashboard(study) as (address, process):
        page.go(address)
        page.until("document.getElementById('live').dataset.state === 'live'")
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
        page.until("document.getElementById('live').dataset.state === 'lost'")
        assert "what you see is old" in page.js("document.getElementById('told').textContent")
        assert page.js(LOOK).startswith("Round 2"), "and keeps what it had"


def test_the_token_opens_the_page_once_and_stays_nowhere(study: Study, page: Page) -> None:
    with dashboard(study, "--token") as (address, process):
        page.go(address)
        assert page.js("location.pathname") == "/login"
        for typed, there in (("wrong", "/login"), (_token(study), "/")):
            page.until("document.activeElement.id === 'token'")  # ready to type
            page.call("Input.insertText", text=typed)
            page.key("Enter", 13, "\r")
            page.until(f"location.pathname === '{there}' && document.querySelector('h1')")
            page.until("document.getElementById('wrong') || document.getElementById('headline')")
        assert page.js(LOOK).startswith("Round 2")
        assert page.js("document.cookie") == "", "no script sees it"
        assert not any(_token(study) in url for url in page.asked)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=20)[0]
        assert _token(study) not in said


def _token(study: Study) -> str:
    return (study.folder.run / "dashboard.token").read_text().strip()


# Texts whose colour stands out too little from what is behind them (WCAG 2.2, 1.4.3: 4.5 to 1).
CONTRASTS = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [x, y, z] = colour.map(linear);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility()) continue;
    const style = getComputedStyle(e);
    const paint = e instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(parse(paint)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${e.textContent.trim().slice(0, 20)}: ${ratio.toFixed(2)}`);
  }
  return found;
})()"""
