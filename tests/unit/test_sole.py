"""Only one at a time, with a real second process."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedseg.sole import BusyError, holder, sole

HOLDS = (
    "import sys, time; from pathlib import Path; from fedseg.sole import sole\n"
    "with sole(Path(sys.argv[1]), 'it runs'): print('held', flush=True); time.sleep(60)"
)


def test_one_holds_it_and_says_who(tmp_path):
    path = tmp_path / "run" / "x.lock"
    assert holder(path) is None
    with sole(path, "it runs"):
        assert holder(path) == os.getpid()
        with pytest.raises(BusyError, match=f"it runs already, in process {os.getpid()}"):  # noqa: SIM117
            with sole(path, "it runs", patience_s=0.1):
                pass
    assert holder(path) is None and path.exists()


def test_a_killed_holder_lets_go(tmp_path):
    path = tmp_path / "x.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert holder(path) == other.pid
        with pytest.raises(BusyError), sole(path, "it runs", patience_s=0.1):
            pass
        other.kill()
    with sole(path, "it runs"):
        assert holder(path) == os.getpid()


def test_who_only_looks_is_waited_for(tmp_path):
    path = tmp_path / "x.lock"
    looker = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE)
    assert looker.stdout is not None and looker.stdout.readline()
    looker.kill()
    with sole(path, "it runs", patience_s=5.0):
        pass
    looker.communicate()


def test_many_who_look_at_once_do_not_take_each_other_for_the_holder(tmp_path):
    """A killed run's number stands in the file; the daemon would end the run that follows it."""
    path = tmp_path / "x.lock"
    path.write_text("999999\n")
    with ThreadPoolExecutor(4) as pool:
        looks = pool.map(lambda _: {holder(path) for _ in range(500)}, range(4))
        assert set().union(*looks) == {None}
