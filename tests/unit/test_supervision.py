"""Supervision, with real processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest

from fedseg.errors import DataError
from fedseg.logs import configure
from fedseg.offspring import end_strays
from fedseg.supervision import Happening, Program, Supervisor, complete

SLEEPER = "import time; time.sleep(60)"
STUBBORN = (
    "import signal, time, pathlib, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
)
# Starts a child in a session of its own, as flower-superlink does, and tells who it is.
PARENT = (
    "import subprocess, sys, time, pathlib;"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    " start_new_session=True);"
    "pathlib.Path(sys.argv[1]).write_text(str(child.pid)); time.sleep(60)"
)


class Watched:
    """A supervisor with everything that it told."""

    def __init__(self, *programs: Program, keeper: str | None = None) -> None:
        self.told: list[Happening] = []
        self.supervisor = Supervisor(programs, observe=self.told.append, keeper=keeper)

    def until(self, wanted: Callable[[], bool], within_s: float = 10.0) -> None:
        deadline = time.monotonic() + within_s
        while not wanted():
            assert time.monotonic() < deadline, self.told
            self.supervisor.step()
            time.sleep(0.005)

    def pid(self, name: str = "p") -> int:
        pid = self.supervisor.states()[name].pid
        assert pid is not None
        return pid

    def kinds(self) -> list[str]:
        return [happening.kind for happening in self.told]


@pytest.fixture
def watch():
    made: list[Watched] = []

    def make(*programs: Program, keeper: str | None = None) -> Watched:
        made.append(Watched(*programs, keeper=keeper))
        return made[-1]

    yield make
    for watched in made:
        watched.supervisor.stop_all(grace_s=0.2)


def program(folder: Path, code: str, *arguments: str, **options: object) -> Program:
    command = (sys.executable, "-S", "-c", code, *arguments)
    given: dict[str, object] = {"environment": {}, "log": folder / "p.log", "backoff_s": 0.05}
    return Program("p", command, **{**given, **options})  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pid: int, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


def test_a_program_runs_with_its_environment_alone(tmp_path, watch):
    code = "import os; print(sorted(os.environ)); import time; time.sleep(60)"
    watched = watch(program(tmp_path, code, environment={"PYTHONUNBUFFERED": "1", "LC_ALL": "C"}))
    watched.until(lambda: "\n" in read(tmp_path / "p.log") and "ready" in watched.kinds())
    assert read(tmp_path / "p.log").strip() == "['FEDSEG_KEPT_BY', 'LC_ALL', 'PYTHONUNBUFFERED']"
    assert watched.kinds() == ["started", "ready"]


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_a_killed_program_is_started_again(tmp_path, watch):
    watched = watch(program(tmp_path, SLEEPER))
    watched.until(lambda: watched.supervisor.states()["p"].ready)
    first = watched.pid()
    os.kill(first, signal.SIGKILL)
    watched.until(lambda: watched.supervisor.states()["p"].restarts == 1)
    state = watched.supervisor.states()["p"]
    assert state.pid not in {None, first}
    assert state.last_exit == -signal.SIGKILL
    (ended,) = [h for h in watched.told if h.kind == "ended"]
    assert not ended.expected and ended.wait_s == 0.05 and "killed by signal 9" in ended.detail


def test_a_crash_loop_waits_twice_as_long_each_time_up_to_the_limit(tmp_path, watch):
    # A life longer than the longest wait starts counting anew; on a busy machine Python needs long.
    watched = watch(program(tmp_path, "raise SystemExit(3)", backoff_s=0.5, max_backoff_s=1.5))

    def waits() -> list[float | None]:
        return [h.wait_s for h in watched.told if h.kind == "ended"]

    watched.until(lambda: len(waits()) == 4)
    assert waits() == pytest.approx([0.5, 1.0, 1.5, 1.5])


def test_a_long_life_is_forgiven(tmp_path, watch):
    now = [0.0]
    told: list[Happening] = []
    crashing = program(tmp_path, "raise SystemExit(3)", backoff_s=1.0, max_backoff_s=30.0)
    supervisor = Supervisor([crashing], observe=told.append, clock=lambda: now[0])

    def ends(count: int, after_s: float) -> float | None:
        supervisor.step()
        now[0] += after_s
        while len([h for h in told if h.kind == "ended"]) < count:
            supervisor.step()
        wait = next(h.wait_s for h in reversed(told) if h.kind == "ended")
        now[0] += wait or 0.0
        return wait

    assert [ends(1, 1.0), ends(2, 1.0), ends(3, 31.0), ends(4, 1.0)] == [1.0, 2.0, 1.0, 2.0]
    supervisor.stop_all()


def test_an_expected_exit_is_said_and_keeps_the_wait_short(tmp_path, watch):
    said = {305 % 256: "waits: Flower still holds the old session"}
    watched = watch(
        program(tmp_path, "import os; os._exit(305 % 256)", backoff_s=0.02, expected_exits=said)
    )
    watched.until(lambda: watched.kinds().count("ended") == 4)
    ended = [h for h in watched.told if h.kind == "ended"]
    assert {h.wait_s for h in ended} == {0.02} and all(h.expected for h in ended)
    assert ended[0].detail == "p waits: Flower still holds the old session"


def test_what_cannot_be_executed_is_named_and_tried_again(tmp_path, watch):
    nothing = Program("p", ("/no/such/program",), {}, tmp_path / "p.log", backoff_s=0.02)
    watched = watch(nothing)
    watched.until(lambda: watched.kinds().count("ended") == 2)
    assert watched.told[0].detail == "p cannot be started: No such file or directory"


def test_ready_is_what_the_probe_says(tmp_path, watch):
    open_ = [False]
    watched = watch(program(tmp_path, SLEEPER, ready=lambda: open_[0]))
    for _ in range(5):
        watched.supervisor.step()
    assert not watched.supervisor.states()["p"].ready
    open_[0] = True
    watched.until(lambda: watched.supervisor.states()["p"].ready)
    assert watched.kinds() == ["started", "ready"]


def test_a_stopped_program_stays_stopped_until_it_is_started(tmp_path, watch):
    watched = watch(program(tmp_path, SLEEPER))
    watched.until(lambda: watched.supervisor.states()["p"].ready)
    watched.supervisor.stop("p")
    watched.until(lambda: watched.supervisor.states()["p"].pid is None)
    for _ in range(20):
        watched.supervisor.step()
    assert watched.kinds() == ["started", "ready", "stopped"]
    watched.supervisor.start("p")
    watched.until(lambda: watched.supervisor.states()["p"].ready)


def test_who_does_not_listen_is_killed(tmp_path, watch):
    watched = watch(program(tmp_path, STUBBORN, str(tmp_path / "deaf")))
    watched.until((tmp_path / "deaf").exists)
    pid = watched.pid()
    watched.supervisor.stop("p", grace_s=0.2)
    watched.until(lambda: watched.supervisor.states()["p"].pid is None)
    assert gone(pid)
    assert watched.told[-1].status == -signal.SIGKILL


def test_replace_starts_restarts_and_ends(tmp_path, watch):
    def named(name: str, code: str = SLEEPER) -> Program:
        command = (sys.executable, "-S", "-c", code)
        return Program(name, command, {}, tmp_path / f"{name}.log", backoff_s=0.02)

    watched = watch(named("same"), named("changed"), named("leaves"))
    states = watched.supervisor.states
    watched.until(lambda: all(state.ready for state in states().values()))
    before = {name: watched.pid(name) for name in states()}
    watched.supervisor.replace([named("same"), named("changed", SLEEPER + "#"), named("new")])
    watched.until(
        lambda: (
            set(states()) == {"same", "changed", "new"}
            and all(state.ready for state in states().values())
            and watched.pid("changed") != before["changed"]
        )
    )
    assert watched.pid("same") == before["same"]
    assert gone(before["leaves"])


def test_stop_all_leaves_nothing_and_no_zombie(tmp_path, watch):
    watched = watch(program(tmp_path, PARENT, str(tmp_path / "child")))
    watched.until(lambda: bool(read(tmp_path / "child")))
    pids = [watched.pid(), int(read(tmp_path / "child"))]
    watched.supervisor.stop_all()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_what_a_killed_program_left_behind_is_ended_before_it_runs_again(tmp_path, watch):
    watched = watch(program(tmp_path, PARENT, str(tmp_path / "child")))
    watched.until(lambda: bool(read(tmp_path / "child")))
    orphan = int(read(tmp_path / "child"))
    (tmp_path / "child").unlink()
    os.kill(watched.pid(), signal.SIGKILL)
    watched.until(lambda: watched.supervisor.states()["p"].restarts == 1)
    assert not alive(orphan)
    assert watched.kinds()[2:5] == ["ended", "strays", "started"]
    watched.until(lambda: bool(read(tmp_path / "child")) and alive(int(read(tmp_path / "child"))))


DAEMON = """
import sys, time
from pathlib import Path
from fedseg.supervision import Program, Supervisor
folder = Path(sys.argv[1])
code = sys.argv[2]
run = Program("p", (sys.executable, "-S", "-c", code, str(folder / "child")), {}, folder / "p.log")
supervisor = Supervisor([run], observe=lambda told: print(told.kind, told.pid, flush=True),
                        keeper=str(folder))
while True:
    supervisor.step()
    time.sleep(0.01)
"""


def started_daemon(folder: Path) -> tuple[subprocess.Popen[str], int]:
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(folder), PARENT], stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout is not None
    kind, pid = daemon.stdout.readline().split()
    if kind == "strays":
        kind, pid = daemon.stdout.readline().split()
    assert kind == "started"
    while not read(folder / "child"):
        time.sleep(0.01)
    return daemon, int(pid)


def test_a_killed_daemon_leaves_no_child_and_the_next_one_ends_the_orphans(tmp_path, watch):
    daemon, child = started_daemon(tmp_path)
    orphan = int(read(tmp_path / "child"))
    daemon.kill()
    daemon.communicate()
    assert gone(child)
    assert alive(orphan), "it is in a session of its own and nobody asked it to end"
    (tmp_path / "child").unlink()
    try:
        daemon, child = started_daemon(tmp_path)
        assert gone(orphan)
    finally:
        daemon.kill()
        daemon.communicate()
        end_strays(str(tmp_path), [])
    assert gone(child)


def test_another_keepers_processes_are_left_alone(tmp_path, watch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = watch(program(tmp_path / "a", SLEEPER), keeper="one")
    other = watch(program(tmp_path / "b", SLEEPER), keeper="other")
    for watched in (one, other):
        watched.until(lambda watched=watched: watched.supervisor.states()["p"].ready)
    assert end_strays("one", []) == [one.pid()]
    assert gone(one.pid()) and alive(other.pid())


def test_a_log_is_cut_when_it_is_too_long(tmp_path, watch, monkeypatch):
    monkeypatch.setattr("fedseg.supervision.LONGEST_LOG_BYTES", 10_000)
    code = "import time\nwhile True: print('x' * 99, flush=True); time.sleep(0.001)"
    watched = watch(program(tmp_path, code))
    watched.until((tmp_path / "p.log.1").exists)
    watched.until(lambda: 0 < (tmp_path / "p.log").stat().st_size < 10_000)
    assert read(tmp_path / "p.log").startswith("x")


def test_complete_gives_status_and_words(tmp_path):
    code = "import os, sys; print(os.environ['A']); sys.exit(4)"
    assert complete((sys.executable, "-c", code), {"A": "b"}, timeout_s=20) == (4, "b\n")
    with pytest.raises(DataError, match="did not end within 0 s"):
        complete((sys.executable, "-c", SLEEPER), {}, timeout_s=0.3)
    with pytest.raises(DataError, match="cannot be run: No such file"):
        complete(("/no/such/program",), {}, timeout_s=1)


def test_daemons_log_json_lines():
    stream, root = StringIO(), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        configure(stream)
        logging.getLogger("x").info("site %s is\n back", "ä", extra={"fields": {"round": 3}})
        with suppress(ValueError):
            raise ValueError("no")
        try:
            raise RuntimeError("odd")
        except RuntimeError:
            logging.getLogger("x").exception("failed")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first.pop("time").endswith("+00:00")
    assert first == {"level": "info", "logger": "x", "message": "site ä is\n back", "round": 3}
    assert "RuntimeError: odd" in second["error"] and second["level"] == "error"
