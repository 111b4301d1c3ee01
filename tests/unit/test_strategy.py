"""The plan's section `aggregation`: what goes together, and what is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from small_plans import private_values, values

from fedseg.plan import StudyPlan
from fedseg.strategy import Aggregation

UNIFORM = {"weighting": "uniform"}
SGD = {"name": "sgd", "momentum": 0.0}


def test_servers_begin_with_their_usual_settings() -> None:
    assert (Aggregation().server_learning_rate, Aggregation().server_momentum) == (1.0, 0.0)
    momentum = Aggregation.model_validate({"strategy": "fedavgm"})
    assert (momentum.server_learning_rate, momentum.server_momentum) == (1.0, 0.9)
    for name, beta in (("fedadam", 0.9), ("fedyogi", 0.9), ("fedadagrad", 0.0)):
        rule = Aggregation.model_validate({"strategy": name})
        assert (rule.server_learning_rate, rule.server_momentum) == (0.01, beta)
        assert Aggregation.model_validate(rule.model_dump(mode="json")) == rule


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"strategy": "fedavg", "server_momentum": 0.5}, "set strategy: fedavgm"),
        ({"strategy": "fedavgm", "server_momentum": 0.0}, "above 0 for fedavgm"),
        ({"strategy": "ditto"}, "ditto_lambda must be above 0"),
        ({"ditto_lambda": 0.1}, "ditto_lambda belongs to ditto"),
        ({"server_beta2": 0.5}, "belong to fedadam"),
        ({"server_tau": 0.5}, "belong to fedadam"),
        ({"strategy": "scaffold", "server_momentum": 0.5}, "no server_momentum"),
        ({"strategy": "scaffold", "server_learning_rate": 0.5}, "server_learning_rate of 1"),
        ({"strategy": "scaffold", "combine": {"rule": "median"}} | UNIFORM, "does not keep"),
        ({"combine": {"rule": "median"}}, "say weighting: uniform"),
        ({"combine": {"rule": "median"}, "minimum_sites": 2} | UNIFORM, "at least 3 answers"),
        ({"combine": {"rule": "trimmed_mean", "trim": 2}} | UNIFORM, "at least 5 answers"),
        ({"combine": {"rule": "krum", "byzantine": 1}} | UNIFORM, "at least 5 answers"),
        (
            {"combine": {"rule": "multi_krum", "byzantine": 1, "keep": 6}, "minimum_sites": 5}
            | UNIFORM,
            "more than minimum_sites",
        ),
        ({"combine": {"rule": "bulyan"}}, "norm_bound"),
        ({"combine": {"rule": "norm_bound"}}, "Field required"),
    ],
)
def test_what_makes_no_sense_together_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Aggregation.model_validate(settings)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aggregation__strategy": "scaffold"}, "name: sgd, momentum: 0"),
        (
            {"aggregation__strategy": "scaffold", "training__optimiser": {"name": "sgd"}},
            "name: sgd, momentum: 0",
        ),
        (
            {"aggregation__strategy": "fedbn", "training__trainable": "norms"},
            "nothing would be shared",
        ),
        (
            {"aggregation__strategy": "fedbn", "training__trainable": "head"},
            "does not train them",
        ),
        ({"aggregation__strategy": "fedper", "training__trainable": "norms"}, "does not train"),
    ],
)
def test_a_strategy_must_fit_the_training(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        StudyPlan.model_validate(values(**changes))


@pytest.mark.parametrize("strategy", ["scaffold", "ditto"])
def test_what_would_leave_without_noise_is_refused_under_a_guarantee(strategy: str) -> None:
    changes = {"aggregation__strategy": strategy, "training__optimiser": SGD}
    if strategy == "ditto":
        changes["aggregation__ditto_lambda"] = 0.1
    with pytest.raises(ValidationError, match="more from patients than the update"):
        StudyPlan.model_validate(private_values(**changes))


def test_a_plan_built_for_another_strategy_is_refused() -> None:
    spec = {"name": "a", "shape": [1], "dtype": "float32"}
    initial = {"digest": "0" * 64, "tensors": [spec, spec | {"name": "b"}]}
    for strategy, personal in (("fedbn", []), ("fedavg", ["a"])):
        with pytest.raises(ValidationError, match="run `fedseg plan build` again"):
            StudyPlan.model_validate(
                values(aggregation__strategy=strategy, initial=initial | {"personal": personal})
            )
    for wrong in ({"personal": ["c"]}, {"personal": ["a"], "frozen": ["a"]}):
        with pytest.raises(ValidationError, match="name other tensors"):
            StudyPlan.model_validate(values(initial=initial | wrong))
    with pytest.raises(ValidationError, match="nothing is shared"):
        StudyPlan.model_validate(values(initial=initial | {"frozen": ["a", "b"]}))
