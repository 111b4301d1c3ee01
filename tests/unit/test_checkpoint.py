"""A study's state on disk: it comes back whole, or it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pure_studies import run_purely
from small_plans import built_plan, tiny_model

from fedseg.aggregation.checkpoint import load_state, save_state
from fedseg.aggregation.rounds import StudyState, first_state
from fedseg.aggregation.server import ServerState
from fedseg.arrays import digest_of
from fedseg.container import MAX_HEADER_BYTES, pack
from fedseg.errors import RoundError, TrustError
from fedseg.modelfile import ModelHeader
from fedseg.plan import StudyPlan
from fedseg.result import SiteAnswer, StageRecord

PLAN = built_plan(
    aggregation__strategy="fedavgm",
    aggregation__server_momentum=0.5,
    aggregation__weight_averaging=0.5,
)


@pytest.fixture
def state() -> StudyState:
    return run_purely(first_state(PLAN, tiny_model()), PLAN, most_stages=3)[-1]


@pytest.fixture
def path(tmp_path: Path, state: StudyState) -> Path:
    path = tmp_path / "checkpoint.safetensors"
    save_state(path, PLAN, state)
    return path


def test_a_state_comes_back_whole(path: Path, state: StudyState) -> None:
    found = load_state(path, PLAN)
    assert (found.position, found.history) == (state.position, state.history)
    assert found.server.steps == 2
    for part in ("model", "momentum", "average"):
        assert digest_of(getattr(found.server, part)) == digest_of(getattr(state.server, part))


def test_equal_states_give_equal_bytes(path: Path, state: StudyState) -> None:
    before = path.read_bytes()
    save_state(path, PLAN, load_state(path, PLAN))
    assert path.read_bytes() == before


def test_a_state_without_momentum_and_average_has_none(tmp_path: Path) -> None:
    plan = built_plan()
    save_state(tmp_path / "c", plan, first_state(plan, tiny_model()))
    found = load_state(tmp_path / "c", plan)
    assert (found.server.momentum, found.server.average) == (None, None)


def test_a_checkpoint_of_another_plan_is_refused(path: Path) -> None:
    with pytest.raises(RoundError, match=r"of another plan.*another --out"):
        load_state(path, built_plan())


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(RoundError, match="no checkpoint to go on from"):
            load_state(path, PLAN)


def test_a_damaged_checkpoint_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for damaged in (b"", data[:100], data[:-1], data + b"x", b"\xff" * len(data)):
        path.write_bytes(damaged)
        with pytest.raises(TrustError):
            load_state(path, PLAN)


def test_a_changed_weight_in_a_checkpoint_is_noticed(path: Path, state: StudyState) -> None:
    weights = sum(a.nbytes for a in state.server.model.values()) * 5
    data = path.read_bytes()
    for place in range(len(data) - weights, len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(TrustError, match="damaged"):
            load_state(path, PLAN)


def test_another_kind_of_file_is_no_checkpoint(path: Path) -> None:
    header = ModelHeader(
        plan=PLAN,
        plan_digest=PLAN.digest,
        model_digest=digest_of(tiny_model()),
        arm="federated",
        rounds=1,
    )
    path.write_bytes(pack(header, tiny_model()))
    with pytest.raises(TrustError, match="the header is no"):
        load_state(path, PLAN)


def test_a_full_disk_leaves_the_old_state(path: Path, state: StudyState) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full to play a full disk")
    path.with_name(path.name + ".part").symlink_to("/dev/full")
    with pytest.raises(RoundError, match="untouched"):
        save_state(path, PLAN, replace(state, position=None))
    assert load_state(path, PLAN).position == state.position


def test_a_long_history_can_be_read_back(path: Path, state: StudyState) -> None:
    long_answer = SiteAnswer(site="site_a", patients=1, bytes_up=1, scores={"x" * 100_000: {}})
    record = StageRecord(
        round=1,
        stage="train",
        attempt=1,
        bytes_down=0,
        bytes_up=0,
        answers=(long_answer,) * (MAX_HEADER_BYTES // 100_000 + 1),
        failures=(),
    )
    save_state(path, PLAN, replace(state, history=(record,)))
    assert path.stat().st_size > MAX_HEADER_BYTES
    assert load_state(path, PLAN).history == (record,)


def test_a_half_precision_model_with_all_the_servers_memory_can_be_read_back(
    tmp_path: Path,
) -> None:
    model = {"w": np.zeros(7_000_000, np.float16)}
    plan: StudyPlan = built_plan(model)
    doubles = {"w": np.zeros(7_000_000, np.float64)}
    server = ServerState(model, doubles, doubles, doubles, doubles, steps=1)
    save_state(tmp_path / "c", plan, StudyState(None, server))
    assert load_state(tmp_path / "c", plan).server.steps == 1
