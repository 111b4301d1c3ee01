"""What an operator sees and asks, on folders that no daemon runs on."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from io import StringIO

import pytest
from rich.console import Console
from small_plans import tiny_model
from small_studies import NOW, founded, hospital

from coordinator.commands.status_page import page
from coordinator.office.enrolment import register
from coordinator.progress.keeper import ProgressKeeper
from coordinator.rounds.events import SiteAnswered, SiteFailed, StageClosed, StageOpened
from coordinator.running.control import (
    DaemonReport,
    NodeReport,
    ProgramReport,
    look,
    pause,
    read_log,
    resume,
    stop,
)
from fedseg.aggregation.rounds import first_state
from fedseg.durable import write_atomically
from fedseg.errors import DataError
from fedseg.result import SiteAnswer, SiteFailure, StageRecord
from fedseg.sole import sole


@pytest.fixture
def folder(tmp_path):
    made, key = founded(tmp_path / "study")
    register(made, hospital("hospital_a", tmp_path).request, key, NOW)
    return made


def shown(folder, now=NOW) -> str:
    console = Console(file=StringIO(), width=110)
    console.print(page(look(folder, now), now))
    return console.file.getvalue()


def test_a_study_that_never_ran_says_so(folder):
    seen = look(folder, NOW)
    assert (seen.doing, seen.daemon, seen.progress, seen.warnings) == (
        "not running",
        None,
        None,
        (),
    )
    assert "No site is on line yet" in shown(folder) and "fl.example.org:443" in shown(folder)


def test_what_ends_soon_is_warned_of(folder):
    late = NOW + timedelta(days=380)
    assert [w.split(" ends ")[0] for w in look(folder, late).warnings] == [
        "the server's certificate",
        "the roll of sites",
    ]
    assert "renew" in shown(folder, late)


def test_rounds_sites_and_dice_are_shown(folder):
    plan = folder.plan()
    state = first_state(plan, tiny_model())
    keeper = ProgressKeeper(
        folder.progress, plan, state, sites=("hospital_a", "hospital_b"), now=lambda: NOW
    )
    scores = {"dice": {"anterior": 0.75, "posterior": 0.25}}
    good = SiteAnswer(site="hospital_a", patients=4, scores=scores, bytes_up=10)
    bad = SiteFailure(site="hospital_b", code="timeout", reason="no answer came")
    keeper(StageOpened(1, "evaluate", 1, 2))
    keeper(SiteAnswered(1, "evaluate", good))
    keeper(SiteFailed(1, "evaluate", bad))
    record = StageRecord(
        round=1,
        stage="evaluate",
        attempt=1,
        bytes_down=20,
        bytes_up=10,
        answers=(good,),
        failures=(bad,),
    )
    keeper(StageClosed(record, 12.0))
    keeper(StageOpened(2, "train", 1, 1))
    programs = (ProgramReport(name="superlink", pid=7, ready=True, restarts=2),)
    nodes = (NodeReport(site="hospital_a", online=True, last_seen=NOW.isoformat()),)
    told = DaemonReport(pid=1, programs=programs, run=3, run_pid=9, nodes=nodes)
    with sole(folder.daemon_pid, "a coordinator runs on this study"):
        write_atomically(folder.daemon_report, told.model_dump_json().encode())
        text = shown(folder)
        assert look(folder, NOW).doing == "running"
    assert "superlink up (2 restarts), run 3 works" in text
    assert "round 2, train; waits for hospital_a, hospital_b" in text
    assert "0.500 after round 1" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("hosp")}
    assert lines["hospital_a"][1:3] == ["yes", "now"] and "0.500" in lines["hospital_a"]
    assert lines["hospital_b"][-2:] == ["1", "(timeout)"]


def test_a_pause_lasts_until_it_is_resumed(folder):
    assert [pause(folder), pause(folder), folder.paused.exists()] == [True, False, True]
    assert [resume(folder), resume(folder), folder.paused.exists()] == [True, False, False]


def test_there_is_nothing_to_stop_where_nothing_runs(folder):
    with pytest.raises(DataError, match="there is nothing to stop"):
        stop(folder, within_s=1)
    assert not folder.stop.exists()


def test_stop_waits_until_the_daemon_is_gone(folder):
    def live() -> None:
        with sole(folder.daemon_pid, "a coordinator runs on this study"):
            held.set()
            while not folder.stop.exists():
                time.sleep(0.01)
            time.sleep(0.2)

    held = threading.Event()
    thread = threading.Thread(target=live)
    thread.start()
    held.wait(5)
    stop(folder, within_s=10)
    assert not thread.join(5) and not thread.is_alive()


def test_logs_are_read_from_their_end_and_followed(folder):
    with pytest.raises(DataError, match=r"there is no study\.log yet"):
        next(read_log(folder.log("study"), 5))
    log = folder.log("study")
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    assert list(read_log(log, 2)) == ["line 98\n", "line 99\n"]
    following = read_log(log, 1, follow=True)
    assert next(following) == "line 99\n"
    with log.open("a") as file:
        file.write("line 100\n")
    assert next(following) == "line 100\n"
    log.write_text("cut\n")
    assert next(following) == "cut\n"
