"""The exact sum: no order shows, the mean is right, and what cannot be held changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_plans import tiny_model

from fedseg.aggregation.accumulate import MAX_VALUE, MAX_WEIGHT, SCALE_BITS, MeanAccumulator
from fedseg.arrays import Arrays, digest_of, schema_of
from fedseg.errors import RoundError
from fedseg.schema import TensorSpec

BOUND = 2.0 ** -(SCALE_BITS + 1)
LARGEST = float(np.nextafter(np.float32(MAX_VALUE), np.float32(0)))
values = st.floats(-LARGEST, LARGEST, width=32)
shapes = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)


@st.composite
def updates(draw: st.DrawFn) -> list[tuple[dict[str, Any], int]]:
    """Updates of one schema with weights that may be summed."""
    schema = draw(st.dictionaries(st.sampled_from("abc"), shapes, min_size=1))
    one = st.fixed_dictionaries(
        {name: hnp.arrays(np.float32, shape, elements=values) for name, shape in schema.items()}
    )
    return draw(st.lists(st.tuples(one, st.integers(1, MAX_WEIGHT // 8)), min_size=1, max_size=6))


def folded(some: list[tuple[dict[str, Any], int]]) -> MeanAccumulator:
    total = MeanAccumulator(schema_of(some[0][0]))
    for update, weight in some:
        total.fold(update, weight)
    return total


@given(updates(), st.randoms(use_true_random=False))
def test_the_order_of_the_answers_leaves_no_trace(some: Any, random: Any) -> None:
    shuffled = list(some)
    random.shuffle(shuffled)
    assert digest_of(folded(shuffled).mean()) == digest_of(folded(some).mean())


@given(updates())
def test_the_mean_is_that_of_float64_within_the_stated_bound(some: Any) -> None:
    total = folded(some)
    mean = total.mean()
    weights = np.array([weight for _, weight in some], np.float64)
    assert (total.weight, total.count) == (weights.sum(), len(some))
    for name, array in mean.items():
        stack = np.stack([update[name].astype(np.float64) for update, _ in some])
        expected = np.average(stack, axis=0, weights=weights)
        assert array.dtype == np.float64
        assert array.shape == some[0][0][name].shape
        np.testing.assert_allclose(array, expected, rtol=1e-12, atol=BOUND * (1 + 1e-9))


@given(updates(), st.integers(1, 5))
def test_a_weight_counts_as_that_many_equal_answers(some: Any, times: int) -> None:
    often = MeanAccumulator(schema_of(some[0][0]))
    for update, _ in some:
        for _ in range(times):
            often.fold(update, 1)
    once = folded([(update, times) for update, _ in some])
    assert digest_of(often.mean()) == digest_of(once.mean())


def test_nothing_overflows_at_the_bounds_themselves() -> None:
    schema = (TensorSpec(name="a", shape=(2,), dtype="float32"),)
    total = MeanAccumulator(schema)
    extreme = {"a": np.array([LARGEST, -LARGEST], np.float32)}
    for _ in range(4):
        total.fold(extreme, MAX_WEIGHT // 4)
    assert np.array_equal(total.mean()["a"], extreme["a"])


def test_a_hand_computed_mean() -> None:
    total = MeanAccumulator((TensorSpec(name="a", shape=(2,), dtype="float32"),))
    total.fold({"a": np.array([1.0, -2.0], np.float32)}, 1)
    total.fold({"a": np.array([0.5, 4.0], np.float32)}, 3)
    assert total.mean()["a"].tolist() == [(1.0 + 1.5) / 4, (-2.0 + 12.0) / 4]


def test_large_tensors_are_added_chunk_by_chunk_without_a_seam() -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(size=(1 << 20) + 7).astype(np.float32)
    total = MeanAccumulator(schema_of({"a": array}))
    total.fold({"a": array}, 3)
    total.fold({"a": array}, 2)
    np.testing.assert_allclose(total.mean()["a"], array, rtol=0, atol=BOUND)


@pytest.mark.parametrize("bad", [MAX_VALUE, -MAX_VALUE, 1e30, -1e30, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["conv.bias", "conv.weight", "gain"])
def test_a_value_out_of_bounds_is_refused_and_nothing_is_folded(name: str, bad: float) -> None:
    total = MeanAccumulator(schema_of(tiny_model()))
    total.fold(tiny_model(1), 2)
    before = digest_of(total.mean())
    update = tiny_model(2)
    update[name] = update[name].copy()
    update[name].reshape(-1)[-1] = bad
    with pytest.raises(RoundError, match=rf"tensor '{name}'.*512.*lower the learning rate"):
        total.fold(update, 1)
    assert digest_of(total.mean()) == before
    assert (total.weight, total.count) == (2, 1)
    total.fold(tiny_model(2), 1)


@pytest.mark.parametrize("weight", [0, -1, MAX_WEIGHT - 1, MAX_WEIGHT, 2**31 - 1, 2**80])
def test_a_weight_out_of_bounds_is_refused_and_nothing_is_folded(weight: int) -> None:
    total = MeanAccumulator(schema_of(tiny_model()))
    total.fold(tiny_model(1), 2)
    before = digest_of(total.mean())
    with pytest.raises(RoundError, match="weights must be at least 1"):
        total.fold(tiny_model(2), weight)
    assert digest_of(total.mean()) == before
    assert (total.weight, total.count) == (2, 1)


@pytest.mark.parametrize(
    "update",
    [
        {},
        {**tiny_model(), "more": np.zeros(1, np.float32)},
        {**tiny_model(), "gain": np.zeros(1, np.float32)},
        {**tiny_model(), "conv.weight": np.zeros((3, 2), np.float32)},
    ],
    ids=["none", "more", "axes", "shape"],
)
def test_another_schema_is_our_own_mistake_and_nothing_is_folded(update: Arrays) -> None:
    total = MeanAccumulator(schema_of(tiny_model()))
    total.fold(tiny_model(1), 2)
    before = digest_of(total.mean())
    with pytest.raises(ValueError, match=r"schema|shape"):
        total.fold(update, 1)
    assert digest_of(total.mean()) == before


def test_a_mean_of_nothing_is_a_round_error() -> None:
    with pytest.raises(RoundError, match="no update was folded"):
        MeanAccumulator(schema_of(tiny_model())).mean()
