"""Robust rules: Flower's and numpy's arithmetic, any order of answers, and what they promise."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, MultiKrum
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from small_plans import built_plan, tiny_model

from fedseg.aggregation import spill
from fedseg.aggregation.robust import Combiner, closest, combiner
from fedseg.arrays import Arrays
from fedseg.plan import StudyPlan

FIXED = 2.0**-37  # rounding of an exact sum, see MeanAccumulator
RULES: dict[str, dict[str, Any]] = {
    "mean": {"rule": "mean"},
    "norm_bound": {"rule": "norm_bound", "norm": 1.5},
    "median": {"rule": "median"},
    "trimmed_mean": {"rule": "trimmed_mean", "trim": 2},
    "krum": {"rule": "krum", "byzantine": 1},
    "multi_krum": {"rule": "multi_krum", "byzantine": 1},
    "multi_krum of 2": {"rule": "multi_krum", "byzantine": 1, "keep": 2},
}
ORDER_STATISTICS = [name for name in RULES if name not in ("mean", "norm_bound")]
Updates = dict[str, dict[str, Any]]


def plan_of(rule: str) -> StudyPlan:
    return built_plan(
        aggregation__combine=RULES[rule],
        aggregation__weighting="uniform",
        aggregation__minimum_sites=5,
    )


def updates_of(sites: int, seed: int, scale: float = 1.0) -> Updates:
    """One update a site, of the tiny model's shapes."""
    rng = np.random.default_rng(seed)
    return {
        f"site_{chr(ord('a') + index)}": {
            name: np.asarray(scale * rng.normal(size=array.shape), np.float32)
            for name, array in tiny_model().items()
        }
        for index in range(sites)
    }


def folded(rule: str, updates: Updates, folder: Path | None) -> Combiner:
    total = combiner(plan_of(rule), folder)
    for site, update in updates.items():
        total.fold(update, 1, site)
    return total


def flat(update: Arrays) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([np.asarray(update[k], np.float64).ravel() for k in sorted(update)])


def combined(rule: str, updates: Updates, folder: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    total = folded(rule, updates, folder)
    found = flat({name: total.mean()[name] for name in total.mean()})
    total.close()
    return found


def by_numpy(rule: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rule once more, from its paper, on a matrix (sites, coordinates)."""
    n, kind = len(values), RULES[rule]
    if rule == "mean":
        return np.asarray(values.mean(axis=0))
    if rule == "norm_bound":
        norms = np.linalg.norm(values, axis=1, keepdims=True)
        return np.asarray((values * np.minimum(1, kind["norm"] / norms)).mean(axis=0))
    if rule == "median":
        ranked = np.sort(values, axis=0)
        return np.asarray((ranked[(n - 1) // 2] + ranked[n // 2]) / 2)
    if rule == "trimmed_mean":
        return np.asarray([sum(sorted(column)[2 : n - 2]) / (n - 4) for column in values.T])
    apart = [[sum((one - other) ** 2) for other in values] for one in values]
    scores = [sum(sorted(row[:i] + row[i + 1 :])[: n - 3]) for i, row in enumerate(apart)]
    keep = 1 if rule == "krum" else kind.get("keep", n - 1)
    chosen = sorted(range(n), key=lambda i: (scores[i], i))[:keep]
    return np.asarray(values[chosen].mean(axis=0))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sites", [5, 6, 9])
def test_agrees_with_numpy(rule: str, sites: int, tmp_path: Path) -> None:
    updates = updates_of(sites, seed=sites)
    values = np.stack([flat(update) for update in updates.values()])
    tolerance = 1e-12 if rule in ORDER_STATISTICS else FIXED
    found = combined(rule, updates, tmp_path / "scratch")
    np.testing.assert_allclose(found, by_numpy(rule, values), rtol=0, atol=tolerance)


@pytest.mark.parametrize("sites", [5, 6, 10])
def test_agrees_with_flowers_own_strategies(sites: int, tmp_path: Path) -> None:
    updates = updates_of(sites, seed=40 + sites)
    flowers = {
        "median": FedMedian(),
        "trimmed_mean": FedTrimmedAvg(beta=2.01 / sites),
        "krum": Krum(num_malicious_nodes=1),
        "multi_krum of 2": MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2),
    }
    for rule, strategy in flowers.items():
        arrays, _ = strategy.aggregate_train(1, [_reply(u) for u in updates.values()])
        assert arrays is not None
        theirs = flat({name: array.numpy() for name, array in arrays.items()})
        ours = combined(rule, updates, tmp_path / "scratch")
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12, err_msg=rule)


def _reply(update: Arrays) -> Message:
    """A site's answer as Flower's strategies take it, in float64."""
    arrays = ArrayRecord({k: Array(np.asarray(v, np.float64)) for k, v in update.items()})
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=asked)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_answers_leaves_no_trace(rule: str, tmp_path: Path) -> None:
    updates = updates_of(7, seed=3)
    first, likenesses = combined(rule, updates, tmp_path / "scratch"), None
    for seed in range(4):
        order = list(updates)
        random.Random(seed).shuffle(order)
        total = folded(rule, {site: updates[site] for site in order}, tmp_path / "scratch")
        assert flat(dict(total.mean())).tobytes() == first.tobytes()
        likenesses = likenesses or total.likenesses()
        assert total.likenesses() == likenesses
        total.close()


@pytest.mark.parametrize("rule", ORDER_STATISTICS)
def test_chunks_change_no_bit(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = updates_of(6, seed=5)
    whole = combined(rule, updates, tmp_path / "scratch")
    monkeypatch.setattr(spill, "CHUNK", 2)
    np.testing.assert_allclose(
        combined(rule, updates, tmp_path / "scratch"), whole, rtol=0, atol=1e-15
    )


@given(
    honest=st.integers(3, 6),
    lies=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_median_stays_within_the_honest_range(
    tmp_path_factory: pytest.TempPathFactory, honest: int, lies: list[float], seed: int
) -> None:
    lies = lies[: honest - 1]
    updates = updates_of(honest + len(lies), seed)
    told = [flat(updates[site]) for site in sorted(updates)[:honest]]
    for site, lie in zip(sorted(updates)[honest:], lies, strict=True):
        updates[site] = {k: np.full_like(a, lie) for k, a in updates[site].items()}
    found = combined("median", updates, tmp_path_factory.mktemp("median"))
    assert (found >= np.min(told, axis=0)).all()
    assert (found <= np.max(told, axis=0)).all()


@given(seed=st.integers(0, 99), lie=st.floats(-(2.0**50), 2.0**50, width=32))
@settings(max_examples=40, deadline=None)
def test_a_trimmed_mean_stays_within_the_honest_range(
    tmp_path_factory: pytest.TempPathFactory, seed: int, lie: float
) -> None:
    updates = updates_of(5, seed)
    for site in ("site_a", "site_d"):
        updates[site] = {k: np.full_like(a, lie) for k, a in updates[site].items()}
    told = [flat(updates[site]) for site in ("site_b", "site_c", "site_e")]
    found = combined("trimmed_mean", updates, tmp_path_factory.mktemp("trimmed"))
    assert (found >= np.min(told, axis=0)).all()
    assert (found <= np.max(told, axis=0)).all()


@given(
    seed=st.integers(0, 99),
    away=st.floats(20.0, 2.0**50, width=32),
    honest=st.integers(4, 8),
)
@settings(max_examples=40, deadline=None)
def test_krum_picks_an_honest_update(
    tmp_path_factory: pytest.TempPathFactory, seed: int, away: float, honest: int
) -> None:
    """One liar among n >= 2 * 1 + 3, farther away than the honest ones are from each other."""
    updates = updates_of(honest + 1, seed, scale=0.1)
    liar = sorted(updates)[seed % (honest + 1)]
    updates[liar] = {k: a + np.float32(away) for k, a in updates[liar].items()}
    told = [flat(update) for site, update in updates.items() if site != liar]
    found = combined("krum", updates, tmp_path_factory.mktemp("krum"))
    assert any((found == update).all() for update in told)
    several = combined("multi_krum of 2", updates, tmp_path_factory.mktemp("krum"))
    assert (several <= np.max(told, axis=0)).all()


@given(scale=st.floats(1e-3, 1e8), seed=st.integers(0, 99), sites=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_a_bounded_mean_never_exceeds_its_bound(scale: float, seed: int, sites: int) -> None:
    total = folded("norm_bound", updates_of(sites, seed, scale), None)
    values = flat(dict(total.mean()))
    assert np.linalg.norm(values) <= 1.5 * (1 + 1e-12) + FIXED * values.size**0.5


def test_a_small_update_passes_a_norm_bound_untouched() -> None:
    updates = updates_of(3, seed=1, scale=1e-3)
    bounded, plain = (folded(rule, updates, None).mean() for rule in ("norm_bound", "mean"))
    assert flat(dict(bounded)).tobytes() == flat(dict(plain)).tobytes()


def test_ties_in_krum_go_by_name(tmp_path: Path) -> None:
    """Two pairs of equal updates, equally far apart: the first name wins, whoever came first."""
    one, other = updates_of(2, seed=8).values()
    updates = {"site_e": other, "site_d": one, "site_c": other, "site_b": one, "site_f": one}
    updates["site_a"] = other
    found = combined("krum", updates, tmp_path / "scratch")
    assert found.tobytes() == flat(other).tobytes()
    assert closest(np.zeros((5, 5)), 1, 3) == [0, 1, 2]


def test_the_median_of_an_even_number_is_half_way(tmp_path: Path) -> None:
    values = [3.0, -1.0, 10.0, 2.0]
    updates = {
        f"site_{i}": {k: np.full_like(a, value) for k, a in tiny_model().items()}
        for i, value in enumerate(values)
    }
    assert set(combined("median", updates, tmp_path / "scratch")) == {2.5}
