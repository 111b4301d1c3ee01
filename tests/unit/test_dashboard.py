"""The page of a study: who may look, what it says, and that nothing of the study can break it."""

from __future__ import annotations

import asyncio
import re
import stat
from datetime import datetime, timedelta
from functools import partialmethod
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from pure_studies import SITES
from rich.console import Console
from small_plans import built_plan
from small_studies import NOW, founded
from starlette.types import ASGIApp
from typer.testing import CliRunner

from coordinator.cli import app as commands
from coordinator.commands.status_page import page as status_page
from coordinator.dashboard import words
from coordinator.dashboard.charts import Chart, Curve, ticks
from coordinator.dashboard.command import listen
from coordinator.dashboard.guard import COOKIE, cookie_of, dashboard_token
from coordinator.dashboard.notices import Situation, notices
from coordinator.dashboard.page import coded, content, failure_lines, render, round_lines
from coordinator.dashboard.reading import Reader
from coordinator.dashboard.server import make_dashboard
from coordinator.folder import StudyFolder
from coordinator.progress.document import Checkpoint, Progress
from coordinator.progress.tally import (
    FailureEntry,
    OpenStage,
    RoundValue,
    Sighting,
    SiteProgress,
    StageProgress,
    Timing,
)
from coordinator.running.control import Snapshot
from fedseg.errors import DataError, TrustError
from fedseg.result import SiteFailure

TOKEN = "t" * 43
AT = "2026-05-03T12:00:00+00:00"
NASTY = '<script>alert("x")</script>'


def stage(round_: int, kind: str = "train", failing: tuple[str, ...] = (), **more: Any) -> Any:
    values: dict[str, Any] = {
        "attempt": 1,
        "answered": tuple(s for s in SITES if s not in failing),
        "failures": tuple(SiteFailure(site=s, code="timeout", reason="late") for s in failing),
        "loss": 0.5 if kind == "train" else None,
        "dice": 0.7 if kind == "evaluate" else None,
        "bytes_down": 3000,
        "bytes_up": 2000,
        "timing": Timing(closed=AT, wall_s=90.0),
    }
    return StageProgress(round=round_, stage=kind, **(values | more))


def progress_with(**more: Any) -> Progress:
    sites = tuple(
        SiteProgress(
            name=name,
            sighting=Sighting(online=True, last_seen=AT, last_answer=AT),
            patients=4,
            answers=3,
            loss=(RoundValue(round=1, value=0.6), RoundValue(round=2, value=0.5)),
            dice=(RoundValue(round=1, value=0.6), RoundValue(round=2, value=0.7)),
            bytes_up=1_500_000,
        )
        for name in SITES
    )
    stages = (stage(0, "enlist"), stage(1), stage(1, "evaluate"), stage(2), stage(2, "evaluate"))
    values: dict[str, Any] = {
        "study": "tiny",
        "plan": built_plan().digest,
        "rounds": 3,
        "rounds_closed": 2,
        "minimum_sites": 2,
        "attempts": 2,
        "started": AT,
        "updated": AT,
        "phase": "running",
        "open": OpenStage(
            round=3,
            stage="train",
            attempt=1,
            since=AT,
            nodes=3,
            answered=("site_a",),
            waiting_for=("site_b", "site_c"),
        ),
        "sites": sites,
        "stages": stages,
        "checkpoint": Checkpoint(at=AT, model="ab" * 32, round=2),
        "left_s": 130.0,
    }
    return Progress(**(values | more))


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    made, _ = founded(tmp_path / "study")
    made.progress.write_text(progress_with().model_dump_json())
    return made


class Client:
    """A visitor who keeps cookies and follows nothing."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._base = app, f"http://{host}:8080"
        self._cookies = httpx.Cookies()

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(
                transport=transport, base_url=self._base, cookies=self._cookies
            ) as client:
                answer = await client.request(method, path, **more)
                self._cookies = client.cookies
                return answer

        return asyncio.run(ask())

    get = partialmethod(request, "GET")
    head = partialmethod(request, "HEAD")
    post = partialmethod(request, "POST")
    delete = partialmethod(request, "DELETE")


def client_of(
    folder: StudyFolder, *, token: str | None = None, local: bool = True, host: str = "127.0.0.1"
) -> Client:
    reader = Reader(folder, now=lambda: NOW + timedelta(seconds=5))
    return Client(make_dashboard(reader, folder.plan(), token=token, local=local), host)


class TestWhoMayLook:
    def test_on_loopback_everybody_of_this_machine(self, folder: StudyFolder) -> None:
        answer = client_of(folder).get("/")
        assert answer.status_code == 200
        assert "Round 3 of 3: hospitals are training" in answer.text

    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X"])
    @pytest.mark.parametrize("path", ["/", "/progress.json", "/style.css", "/nowhere"])
    def test_nothing_but_reading(self, folder: StudyFolder, method: str, path: str) -> None:
        answer = client_of(folder).request(method, path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == "GET, HEAD"

    def test_head_is_get_without_a_body(self, folder: StudyFolder) -> None:
        client = client_of(folder)
        for path in ("/", "/progress.json", "/style.css", "/live.js"):
            assert client.head(path).headers["etag"] == client.get(path).headers["etag"]

    @pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.org", "localhost.evil", ""])
    def test_a_name_of_others_is_refused_on_loopback(self, folder: StudyFolder, host: str) -> None:
        for path in ("/", "/progress.json", "/style.css", "/login"):
            assert client_of(folder).get(path, headers={"Host": host}).status_code == 421

    @pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1", "[::1]:9000", "LOCALHOST:1"])
    def test_local_names_pass_under_any_port(self, folder: StudyFolder, host: str) -> None:
        assert client_of(folder).get("/", headers={"Host": host}).status_code == 200

    def test_without_the_token_there_is_nothing(self, folder: StudyFolder) -> None:
        client = client_of(folder, token=TOKEN, local=False, host="fl.example.org")
        answer = client.get("/")
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
        for path in ("/progress.json", "/live.js", "/nowhere", "/docs", "/openapi.json"):
            answer = client.get(path)
            assert answer.status_code == 401
            assert "tiny" not in answer.text
        assert "tiny" not in client.get("/login").text

    @pytest.mark.parametrize(
        "headers",
        [
            {"Authorization": f"Bearer {TOKEN[:-1]}"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": "Bearer "},
            {"Authorization": b"Bearer \xff\xfe"},
            {"Cookie": f"{COOKIE}={TOKEN}"},
            {"Cookie": f"{COOKIE}="},
            {"Cookie": ";;=;" + "x" * 4000},
        ],
    )
    def test_what_is_not_quite_the_token(self, folder: StudyFolder, headers: Any) -> None:
        client = client_of(folder, token=TOKEN, local=False)
        assert client.get("/progress.json", headers=headers).status_code == 401

    def test_a_token_in_the_address_does_not_help(self, folder: StudyFolder) -> None:
        client = client_of(folder, token=TOKEN, local=False)
        assert client.get(f"/progress.json?token={TOKEN}").status_code == 401

    def test_a_script_brings_it_in_a_header(self, folder: StudyFolder) -> None:
        client = client_of(folder, token=TOKEN, local=False)
        answer = client.get("/progress.json", headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.json()["study"] == "tiny"

    def test_the_form_sets_a_cookie_that_does_not_tell_the_token(self, folder: StudyFolder) -> None:
        client = client_of(folder, token=TOKEN, local=False)
        answer = client.post("/login", data={"token": f" {TOKEN}\n"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert TOKEN not in cookie
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        assert client.get("/").status_code == 200

    @pytest.mark.parametrize(
        "body", [b"", b"token=", b"token=wrong", b"\xff\x00", b"a&" * 9, b"token=" + b"x" * 4096]
    )
    def test_the_form_says_that_it_was_wrong(self, folder: StudyFolder, body: bytes) -> None:
        client = client_of(folder, token=TOKEN, local=False)
        answer = client.post("/login", content=body)
        assert answer.status_code == 403
        assert "not the token" in answer.text
        assert "set-cookie" not in answer.headers

    def test_every_answer_forbids_outside_resources(self, folder: StudyFolder) -> None:
        client = client_of(folder, token=TOKEN, local=True)
        answers = [
            client.get("/"),
            client.get("/login"),
            client.get("/style.css"),
            client.get("/progress.json"),
            client.delete("/"),
            client.get("/", headers={"Host": "evil.example"}),
        ]
        for answer in answers:
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "unsafe" not in policy and "http" not in policy
            assert answer.headers["cache-control"] == "no-store"


class TestToken:
    def test_it_is_made_once_for_its_owner_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "run" / "dashboard.token"
        token = dashboard_token(path)
        assert len(token) >= 43
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert dashboard_token(path) == token
        assert cookie_of(token) != cookie_of("another")

    def test_one_that_others_can_read_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "dashboard.token"
        dashboard_token(path)
        path.chmod(0o644)
        with pytest.raises(TrustError, match="0600"):
            dashboard_token(path)

    def test_an_empty_one_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "dashboard.token"
        path.touch(0o600)
        with pytest.raises(TrustError, match="holds no token"):
            dashboard_token(path)


class TestPage:
    def test_nothing_new_is_told_in_no_bytes(self, folder: StudyFolder) -> None:
        client = client_of(folder)
        tag = client.get("/").headers["etag"]
        again = client.get("/", headers={"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        folder.progress.write_text(progress_with(left_s=77.0).model_dump_json())
        assert client.get("/", headers={"If-None-Match": tag}).status_code == 200

    def test_a_study_that_has_not_begun_says_so(self, folder: StudyFolder) -> None:
        folder.progress.unlink()
        client = client_of(folder)
        assert "has not started yet" in client.get("/").text
        assert client.get("/progress.json").json() is None

    def test_a_damaged_document_is_named(self, folder: StudyFolder) -> None:
        folder.progress.write_text("{")
        answer = client_of(folder).get("/")
        assert answer.status_code == 200
        assert "cannot be read" in answer.text

    def test_the_document_is_there_for_machines(self, folder: StudyFolder) -> None:
        given = client_of(folder).get("/progress.json")
        assert Progress.model_validate_json(given.content) == progress_with()

    def test_names_from_the_study_are_never_markup(self) -> None:
        bad = SiteProgress(
            name=NASTY,
            sighting=Sighting(),
            dice=(RoundValue(round=1, value=0.5),),
            loss=(RoundValue(round=1, value=0.5),),
        )
        failure = SiteFailure(site=NASTY, code=NASTY, reason=NASTY)
        shown = progress_with(
            study=NASTY,
            phase="failed",
            note=NASTY,
            sites=(bad,),
            stages=(stage(1, failures=(failure,)),),
        )
        page = render(built_plan(), shown, Situation(ending=(NASTY,)))
        assert "<script>alert" not in page
        assert page.count("<script") == 1 and 'src="/live.js"' in page
        assert "style=" not in page and "onclick" not in page

    def test_the_page_is_well_formed_and_its_links_lead_somewhere(self) -> None:
        page = render(built_plan(), progress_with(), Situation())
        seen = _Tags()
        seen.feed(page)
        assert len(seen.ids) == len(set(seen.ids))
        assert seen.landmarks >= {"header", "nav", "main", "footer"}
        assert seen.open == []
        for target in re.findall(r'href="#([a-z]+)"', page):
            assert target in seen.ids

    def test_a_round_is_one_line(self) -> None:
        lines = round_lines((stage(1), stage(1, "evaluate"), stage(2, failing=("site_c",))))
        assert [line.round for line in lines] == [1, 2]
        assert (lines[0].loss, lines[0].dice, lines[0].wall_s) == (0.5, 0.7, 180.0)
        assert (lines[1].answered, lines[1].asked) == (2, 3)
        assert lines[0].bytes_down == 6000

    def test_equal_failures_share_a_line_and_the_latest_is_first(self) -> None:
        stages = (
            stage(1, failing=("site_a", "site_c")),
            stage(2, failing=("site_c",)),
            stage(4, failing=("site_c",)),
        )
        lines = failure_lines(progress_with(stages=stages))
        assert [(line.site, line.rounds) for line in lines] == [
            ("site_c", "1–2, 4"),
            ("site_a", "1"),
        ]
        assert lines[0].what == "Did not answer in time"

    def test_what_each_hospital_does(self) -> None:
        stage_ = OpenStage(
            round=1,
            stage="train",
            attempt=1,
            since=AT,
            nodes=3,
            answered=("site_a",),
            failures=(
                FailureEntry(
                    round=1, stage="train", attempt=1, site="site_b", code="data", reason="x"
                ),
            ),
            waiting_for=("site_c",),
        )
        doing = content(built_plan(), progress_with(open=stage_), Situation())["now_of"]
        assert doing == {
            "site_a": ("done", "Answered"),
            "site_b": ("bad", "Its data could not be used"),
            "site_c": ("busy", "Training"),
        }

    def test_commands_are_shown_as_code(self) -> None:
        assert coded("a `b <c>` d") == "a <code>b &lt;c&gt;</code> d"
        assert coded("plain & `open") == "plain &amp; <code>open</code>"


class TestNotices:
    def test_a_study_that_goes_well_has_none(self) -> None:
        assert notices(progress_with(), Situation()) == ()

    def test_a_study_that_nobody_works_on(self) -> None:
        (found,) = notices(progress_with(), Situation(working=False, daemon=False))
        assert found.level == "stop" and "fedseg-coordinator run" in found.advice
        (found,) = notices(progress_with(), Situation(working=False))
        assert found.level == "look"
        assert notices(progress_with(phase="finished", open=None), Situation(working=False)) == ()

    def test_a_failed_study_says_why(self) -> None:
        (found,) = notices(progress_with(phase="failed", note="too few", open=None), Situation())
        assert (found.level, found.advice) == ("stop", "too few")

    def test_what_ends_soon_is_told_even_when_the_study_is_over(self) -> None:
        (found,) = notices(None, Situation(ending=("the roll ends on 2026-05-20",)))
        assert found.what == "The roll ends on 2026-05-20."

    def test_a_hospital_that_is_away_and_too_few_that_are_left(self) -> None:
        away = Sighting(online=False, last_seen=AT)
        sites = tuple(s.model_copy(update={"sighting": away}) for s in progress_with().sites[:2])
        failing = tuple(
            FailureEntry(round=3, stage="train", attempt=2, site=s, code="offline", reason="x")
            for s in SITES[:2]
        )
        open_ = OpenStage(
            round=3,
            stage="train",
            attempt=2,
            since=AT,
            nodes=1,
            failures=failing,
            waiting_for=("site_c",),
        )
        said = [n.what for n in notices(progress_with(sites=sites, open=open_), Situation())]
        assert any("attempt 2 of 2" in text for text in said)
        assert "2 hospitals must answer, and only 1 can." in said
        assert "site_a and site_b are not on line." in said

    def test_a_hospital_that_lacks_the_final_model(self) -> None:
        stages = (stage(3, "release", failing=("site_c",)),)
        shown = progress_with(phase="finished", open=None, stages=stages)
        (found,) = notices(shown, Situation())
        assert found.what == "The final model has not reached site_c yet."

    def test_a_stage_that_takes_far_longer_than_usual(self) -> None:
        (found,) = notices(progress_with(), Situation(open_s=500.0))
        assert "usually takes 2 min" in found.what and "site_b and site_c" in found.what


class TestReading:
    def test_a_run_that_was_heard_of_lately_works(self, folder: StudyFolder) -> None:
        def situation(seconds: float) -> Situation:
            return Reader(folder, now=lambda: NOW + timedelta(seconds=seconds)).read()[1]

        assert situation(30.0).working
        assert not situation(3000.0).working
        assert situation(30.0).open_s == 30.0

    def test_certificates_that_end_soon_are_told(self, folder: StudyFolder) -> None:
        later = NOW + timedelta(days=380)
        found = Reader(folder, now=lambda: later).read()[1].ending
        assert any("certificate" in text for text in found)

    def test_the_pause_flag_is_seen(self, folder: StudyFolder) -> None:
        reader = Reader(folder, now=lambda: NOW)
        assert not reader.read()[1].paused
        folder.paused.touch()
        assert reader.read()[1].paused


class TestWords:
    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (None, "–"), (0.42, "0.4 s"), (12.3, "12 s"), (59.6, "1 min"), (3599, "1 h"),
            (7500, "2 h 5 min"), (90000, "25 h"), (180000, "2 d 2 h"),
        ],
    )  # fmt: skip
    def test_durations(self, seconds: float | None, text: str) -> None:
        assert words.duration(seconds) == text

    @pytest.mark.parametrize(
        ("size", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1500, "1.5 kB"),
            (999_950, "1.0 MB"),
            (123_456_789, "123 MB"),
        ],
    )
    def test_amounts(self, size: int, text: str) -> None:
        assert words.amount(size) == text

    def test_names_in_a_row(self) -> None:
        assert words.listed(["a"]) == "a"
        assert words.listed(["a", "b"]) == "a and b"
        assert words.listed(list("abcd")) == "a, b, c and d"
        assert words.listed(list("abcdef")) == "a, b, c and 3 others"

    def test_a_code_that_is_not_known_speaks_for_itself(self) -> None:
        assert words.code_words("odd_thing") == ("Odd thing", "")

    def test_every_code_of_a_refusal_has_words(self) -> None:
        from typing import get_args

        from fedseg.updates import RefusalCode

        assert set(get_args(RefusalCode)) <= set(words.CODES)


class TestCharts:
    @pytest.mark.parametrize(
        ("low", "high"), [(0.31, 0.82), (0.0, 2.7), (0.5, 0.5), (0, 20), (0.9991, 0.9993)]
    )
    def test_ticks_span_the_values_at_round_steps(self, low: float, high: float) -> None:
        marks = ticks(low, high)
        assert marks[0] <= low and marks[-1] >= high
        assert 2 <= len(marks) <= 8

    def test_points_lie_where_their_values_say(self) -> None:
        curve = Curve("Mean", "mean", ((1, 0.0), (3, 1.0)))
        svg = Chart("loss", "Loss", "", (curve,), 3, starts_at=0.0).svg
        (places,) = re.findall(r'points="([^"]*)"', svg)
        assert places == "11.0,88.0 97.0,4.0"
        assert svg.count("<circle") == 2

    def test_a_long_study_has_lines_without_marks(self) -> None:
        curve = Curve("Mean", "mean", tuple((n, 1.0 / n) for n in range(1, 200)))
        assert "<circle" not in Chart("loss", "Loss", "", (curve,), 200, starts_at=0.0).svg

    def test_the_picture_is_told_in_words(self) -> None:
        own = Curve("a", "look0", ((1, 0.4), (2, 0.5)))
        mean = Curve("Mean", "mean", ((1, 0.41), (2, 0.52)))
        summary = Chart("dice", "Dice", "", (own, mean), 2).summary
        assert "0.410 in round 1" in summary and "0.520 in round 2" in summary


class TestCommand:
    def test_a_taken_port_is_said(self) -> None:
        with listen("127.0.0.1", 0) as taken, pytest.raises(DataError, match="--port"):
            listen("127.0.0.1", taken.getsockname()[1])

    def test_an_address_of_others_is_said(self) -> None:
        with pytest.raises(DataError, match="--host"):
            listen("203.0.113.7", 0)

    def test_without_a_study_it_does_not_start(self, tmp_path: Path) -> None:
        told = CliRunner().invoke(commands, ["dashboard", "--study", str(tmp_path)])
        assert isinstance(told.exception, DataError)

    def test_it_is_not_served_openly_to_other_machines(self, folder: StudyFolder) -> None:
        folder.server_key.unlink()
        args = ["dashboard", "--study", str(folder.path), "--host", "0.0.0.0", "--port", "0"]
        told = CliRunner().invoke(commands, args)
        assert isinstance(told.exception, DataError)
        assert "--plain" in str(told.exception)


class _Tags(HTMLParser):
    """What stands in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.landmarks: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.landmarks.add(tag)
        if tag not in {"meta", "link", "br", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_times_are_told_in_utc_when_no_script_runs() -> None:
    assert words.moment(AT) == "3 May 12:00:00 UTC"
    assert words.moment(None) == "–"


def test_hospitals_with_some_of_the_labels_are_named_on_page_and_status() -> None:
    plan, whole = built_plan(), progress_with()
    first, *others = whole.sites
    some = progress_with(sites=(first.model_copy(update={"labels": ("posterior",)}), *others))
    said = "Hospitals that annotate some of the labels: site_a posterior. The others annotate all."
    assert said in render(plan, some, Situation())
    assert "annotate some of the labels" not in render(plan, whole, Situation())
    for progress, there in ((some, True), (whole, False)):
        seen = Snapshot(
            study="tiny",
            address="fl.example.org:443",
            daemon=None,
            paused=False,
            progress=progress,
            warnings=(),
        )
        console = Console(width=200, record=True, file=StringIO())
        console.print(status_page(seen, datetime.fromisoformat(AT)))
        text = console.export_text()
        assert ("Labels annotated" in text) is there
        assert ("posterior" in text) is there
