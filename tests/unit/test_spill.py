"""Updates on disk while a round is open: whole or not at all, and swept away afterwards."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pure_studies import run_purely
from small_plans import built_plan, tiny_model

from fedseg.aggregation import spill
from fedseg.aggregation.robust import combiner
from fedseg.aggregation.rounds import first_state
from fedseg.aggregation.spill import Spill, sweep
from fedseg.arrays import digest_of, schema_of
from fedseg.errors import RoundError, StorageError

SCHEMA = schema_of(tiny_model())
MEDIAN: dict[str, Any] = {
    "aggregation__combine": {"rule": "median"},
    "aggregation__weighting": "uniform",
    "aggregation__minimum_sites": 3,
}


def test_what_is_put_is_read_again_by_name(tmp_path: Path) -> None:
    kept = Spill(tmp_path / "scratch", SCHEMA)
    models = {name: tiny_model(seed) for seed, name in enumerate(("c", "a", "b"))}
    for name, model in models.items():
        kept.put(name, model)
    assert kept.sites == ("a", "b", "c")
    for name, part, values in kept.chunks():
        for row, site in zip(values, kept.sites, strict=True):
            np.testing.assert_array_equal(row, models[site][name].reshape(-1)[part])


def test_the_folder_is_the_owners_and_goes_with_the_round(tmp_path: Path) -> None:
    folder = tmp_path / "rounds" / "scratch"
    before = os.umask(0)
    try:
        kept = Spill(folder, SCHEMA)
        kept.put("a", tiny_model())
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]
    kept.close()
    assert not folder.exists()


def test_leftovers_are_swept_away(tmp_path: Path) -> None:
    left = Spill(tmp_path / "scratch", SCHEMA)
    left.put("a", tiny_model())
    again = Spill(tmp_path / "scratch", SCHEMA)
    assert again.sites == ()
    assert list((tmp_path / "scratch").iterdir()) == []
    sweep(tmp_path / "scratch")
    sweep(tmp_path / "scratch")


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Spill(tmp_path / "scratch", SCHEMA)
    kept.put("a", tiny_model())

    def refuse(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "ascontiguousarray", refuse)
        with pytest.raises(StorageError, match=r"No space left .*: make room"):
            kept.put("b", tiny_model(1))
    assert [path.suffix for path in (tmp_path / "scratch").iterdir()] == [".update"]
    assert kept.sites == ("a",)
    kept.put("b", tiny_model(1))
    assert kept.sites == ("a", "b")


def test_an_update_that_was_cut_short_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    kept = Spill(tmp_path / "scratch", SCHEMA)
    kept.put("a", tiny_model())
    file = next((tmp_path / "scratch").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match="cut short"):
        list(kept.chunks())


def test_an_update_of_another_kind_is_our_own_mistake(tmp_path: Path) -> None:
    kept = Spill(tmp_path / "scratch", SCHEMA)
    kept.put("a", tiny_model())
    wide = {name: array.astype(np.float64) for name, array in tiny_model().items()}
    for site, update in (("a", tiny_model()), ("b", {}), ("b", wide)):
        with pytest.raises(ValueError, match=r"already|names|schema"):
            kept.put(site, update)
    with pytest.raises(ValueError, match="scratch folder"):
        combiner(built_plan(**MEDIAN), None)
    with pytest.raises(RoundError, match="nothing to combine"):
        combiner(built_plan(**MEDIAN), tmp_path / "other").mean()


def test_a_robust_study_is_the_same_whoever_answers_first(tmp_path: Path) -> None:
    plan = built_plan(**MEDIAN)
    start = first_state(plan, tiny_model())
    one = run_purely(start, plan, scratch=tmp_path / "one")[-1]
    other = run_purely(start, plan, order=lambda sites: sites[::-1], scratch=tmp_path / "other")[-1]
    assert one.position is None
    assert digest_of(one.server.model) == digest_of(other.server.model)
    assert one.history == other.history
    trained = [record for record in one.history if record.stage == "train"]
    assert all(a.update_distance is not None for record in trained for a in record.answers)


@pytest.mark.parametrize("rule", [{"rule": "median"}, {"rule": "multi_krum", "byzantine": 2}])
def test_memory_is_of_one_model_and_a_chunk_of_every_site(
    rule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, size = 12, 500_000
    model = {"a": np.zeros((size // 10, 10), np.float32)}
    plan = built_plan(
        model,
        aggregation__combine=rule,
        aggregation__weighting="uniform",
        aggregation__minimum_sites=7,
    )
    monkeypatch.setattr(spill, "CHUNK", 4096)
    rng = np.random.default_rng(1)
    tracemalloc.start()
    try:
        total = combiner(plan, tmp_path / "scratch")
        for site in range(sites):
            update = rng.standard_normal(size, np.float32).reshape(model["a"].shape)
            total.fold({"a": update}, 1, f"site_{site}")
        assert total.mean()["a"].shape == model["a"].shape
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    total.close()
    assert peak < 4 * 8 * size < sites * 4 * size
