"""A hospital that trains alone: the same bits as a federation of one, under any study's plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_hospitals import phantoms, tiny_built
from small_private_sites import private_built

from fedseg.alone import plan_alone
from fedseg.errors import DataError
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.manifests import read_manifest
from fedseg.learning.alone import train_alone
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan, parse_plan
from fedseg.simulation.baselines import alone
from fedseg.simulation.federation import Federation
from fedseg.simulation.running import run_federation
from sites.patients import PreparedPatients

SGD = {"optimiser": {"name": "sgd", "learning_rate": 0.01, "momentum": 0.0, "state": "reset"}}
STUDIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "averaged": {"aggregation": {"weight_averaging": 0.7, "weighting": "uniform"}},
    "fedavgm": {"aggregation": {"strategy": "fedavgm", "server_momentum": 0.5}},
    "fedadam": {
        "aggregation": {
            "strategy": "fedadam",
            "server_learning_rate": 0.05,
            "server_momentum": 0.9,
            "server_beta2": 0.98,
            "server_tau": 0.01,
        }
    },
    "fedbn": {"aggregation": {"strategy": "fedbn"}},
    "ditto": {"aggregation": {"strategy": "ditto", "ditto_lambda": 0.1}},
    "scaffold": {"aggregation": {"strategy": "scaffold"}, "training": SGD},
    "median": {
        "aggregation": {"combine": {"rule": "median"}, "weighting": "uniform", "minimum_sites": 3}
    },
    "norms": {"training": {"trainable": "norms"}},
    "adapters": {
        "model": {"adapters": {"rank": 2}},
        "training": {
            "trainable": "norms+adapters",
            "augmentation": {"flip_axes": [0], "noise": 0.1},
        },
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms(tmp_path_factory.mktemp("phantoms"), patients=5)


def built(name: str) -> tuple[StudyPlan, dict[str, Any]]:
    """A study's plan with its initial model."""
    if name == "private":
        return private_built()
    plan, _ = tiny_built()
    value = plan.model_dump(mode="json", exclude={"initial"})
    for section, fields in STUDIES[name].items():
        value[section] |= fields
    plan = StudyPlan.model_validate(value)
    record, model = initial_model(plan)
    return plan.model_copy(update={"initial": record}), dict(model)


@pytest.mark.parametrize("name", [*STUDIES, "private"])
def test_a_site_alone_is_a_federation_of_one_bit_for_bit(
    name: str, data: Path, tmp_path: Path
) -> None:
    plan, initial = built(name)
    cohort = read_manifest(data, plan.task).cohort("hospital_a")
    whole = Federation(plan, initial, (cohort,), tmp_path / "study", tmp_path / "cache")
    single = alone(whole, cohort, tmp_path / "local", plan.training.steps_per_round)
    finished = run_federation(single)
    own = plan_alone(plan)
    assert own == single.plan == parse_plan(own.canonical_bytes)
    patients = PreparedPatients(cohort.split("train"), CaseCache(tmp_path / "cache", plan.task))
    kept = tmp_path / "kept"
    model, losses = train_alone(own, initial, patients, site=cohort.site, kept=kept, data="0" * 64)
    expected = finished.state.server.released(single.plan.aggregation)
    assert model.keys() == expected.keys() and len(losses) == plan.aggregation.rounds
    for tensor, values in expected.items():
        assert np.array_equal(model[tensor], values), tensor
    assert any(not np.array_equal(model[tensor], values) for tensor, values in initial.items())


def test_a_state_is_of_one_site_one_plan_and_one_set_of_data(data: Path, tmp_path: Path) -> None:
    plan, initial = built("fedavg")
    cohort = read_manifest(data, plan.task).cohort("hospital_a")
    patients = PreparedPatients(cohort.split("train"), CaseCache(tmp_path / "cache", plan.task))
    own, kept = plan_alone(plan), tmp_path / "kept"

    def train(plan: StudyPlan, **changes: str) -> list[float]:
        told: list[float] = []
        how: dict[str, Any] = {"site": cohort.site, "data": "0" * 64, "kept": kept} | changes
        train_alone(plan, initial, patients, progress=told.append, **how)
        return told

    losses = train(own)
    assert len(losses) == plan.aggregation.rounds and train(own) == losses
    longer = plan_alone(plan, plan.training.steps_per_round + 1)
    for others in ((longer, {}), (own, {"site": "b"}), (own, {"data": "1" * 64})):
        with pytest.raises(DataError, match="is of another training"):
            train(others[0], **others[1])
    kept.write_bytes(b"torn")
    with pytest.raises(DataError, match="is of another training"):
        train(own)
