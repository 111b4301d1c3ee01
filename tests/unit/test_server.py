"""The server's step, by hand and against Flower's own arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from small_plans import tiny_model

from fedseg.aggregation.accumulate import MeanAccumulator
from fedseg.aggregation.server import ServerState, apply_update
from fedseg.arrays import digest_of, schema_of
from fedseg.strategy import Aggregation

ONE = {"w": np.array([1.0, 2.0], np.float32)}


def mean(*values: float) -> dict[str, Any]:
    return {"w": np.array(values, np.float64)}


def test_fedavg_adds_the_mean_of_the_updates() -> None:
    state = apply_update(ServerState(ONE), mean(0.5, -4.0), Aggregation())
    assert state.model["w"].tolist() == [1.5, -2.0]
    assert state.model["w"].dtype == np.float32
    assert (state.momentum, state.average, state.steps) == (None, None, 1)
    assert state.released(Aggregation()) is state.model
    assert ONE["w"].tolist() == [1.0, 2.0]


def test_fedprox_aggregates_as_fedavg_does() -> None:
    rule = Aggregation(strategy="fedprox", proximal_mu=0.1)
    one = apply_update(ServerState(ONE), mean(0.5, -4.0), rule)
    assert digest_of(one.model) == digest_of(
        apply_update(ServerState(ONE), mean(0.5, -4.0), Aggregation()).model
    )


def test_server_momentum_and_learning_rate_by_hand() -> None:
    rule = Aggregation(strategy="fedavgm", server_learning_rate=0.5, server_momentum=0.75)
    state = apply_update(ServerState(ONE), mean(1.0, 2.0), rule)
    assert state.model["w"].tolist() == [1.5, 3.0]
    state = apply_update(state, mean(1.0, -2.0), rule)
    assert state.momentum is not None
    assert state.momentum["w"].tolist() == [0.75 + 1.0, 1.5 - 2.0]
    assert state.model["w"].tolist() == [1.5 + 0.875, 3.0 - 0.25]
    assert state.steps == 2


def test_weight_averaging_is_bias_corrected_by_hand() -> None:
    rule = Aggregation(weight_averaging=0.5)
    first = apply_update(ServerState(ONE), mean(1.0, 0.0), rule)
    assert first.released(rule)["w"].tolist() == first.model["w"].tolist() == [2.0, 2.0]
    second = apply_update(first, mean(3.0, 3.0), rule)
    assert second.model["w"].tolist() == [5.0, 5.0]
    expected = [(0.25 * 2 + 0.5 * 5) / 0.75] * 2
    np.testing.assert_allclose(second.released(rule)["w"], expected, rtol=1e-7)
    assert second.released(rule)["w"].dtype == np.float32


def test_training_goes_on_from_the_model_and_not_from_the_average() -> None:
    rule = Aggregation(weight_averaging=0.9)
    plain = averaged = ServerState(ONE)
    for step in (mean(1.0, -1.0), mean(0.5, 0.25)):
        plain = apply_update(plain, step, Aggregation())
        averaged = apply_update(averaged, step, rule)
    assert digest_of(plain.model) == digest_of(averaged.model)
    assert digest_of(averaged.released(rule)) != digest_of(averaged.model)


def test_before_the_first_step_the_initial_model_is_released() -> None:
    assert ServerState(ONE).released(Aggregation(weight_averaging=0.9)) is ONE


def test_tensors_without_axes_stay_arrays_of_their_type() -> None:
    rule = Aggregation(strategy="fedavgm", weight_averaging=0.5, server_momentum=0.5)
    state = ServerState(tiny_model())
    for _ in range(2):
        state = apply_update(state, {k: v.astype(float) for k, v in tiny_model(1).items()}, rule)
    for part in (state.model, state.released(rule)):
        assert schema_of(part) == schema_of(tiny_model())


@pytest.mark.parametrize("seed", range(5))
def test_a_round_agrees_with_flowers_fedavg(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = tiny_model(100 + seed)
    records, total = [], MeanAccumulator(schema_of(model))
    for _ in range(int(rng.integers(2, 7))):
        steps = {name: rng.normal(size=array.shape) for name, array in model.items()}
        trained = {name: np.asarray(model[name] + steps[name], np.float32) for name in model}
        patients = int(rng.integers(1, 200))
        arrays = ArrayRecord({name: Array(array) for name, array in trained.items()})
        weight = MetricRecord({"num-examples": patients})
        records.append(RecordDict({"arrays": arrays, "metrics": weight}))
        total.fold({name: trained[name] - model[name] for name in model}, patients)
    ours = apply_update(ServerState(model), total.mean(), Aggregation()).model
    theirs = aggregate_arrayrecords(records, "num-examples")
    for name in model:
        np.testing.assert_allclose(ours[name], theirs[name].numpy(), rtol=0, atol=1e-6)
