"""Every strategy through a whole simulated study: what travels, what stays, what a kill leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_studies import cohorts_of, tiny_federation, tiny_plan

from coordinator.rounds.events import Event, StageClosed
from fedseg.arrays import digest_of
from fedseg.modelfile import load_model
from fedseg.models.parts import NORMS
from fedseg.models.zoo import build_network
from fedseg.plan import StudyPlan
from fedseg.simulation.federation import Federation, site_folder
from fedseg.simulation.running import Finished, run_federation
from fedseg.simulation.scoring import used_at
from sites.state import Memories

SGD = {"optimiser": {"name": "sgd", "learning_rate": 0.05, "momentum": 0.0, "state": "reset"}}
PLANS: dict[str, dict[str, Any]] = {
    "fedavgm": {},
    "fedadam": {},
    "fedyogi": {"server_momentum": 0.5},
    "fedadagrad": {},
    "scaffold": {"weighting": "uniform"},
    "fedbn": {},
    "fedper": {},
    "ditto": {"ditto_lambda": 0.5},
}


class StoppedError(Exception):
    """The coordinator's process ends here."""


def plan_of(strategy: str) -> StudyPlan:
    training = SGD if strategy == "scaffold" else {}
    return tiny_plan(aggregation={"strategy": strategy} | PLANS[strategy], training=training)


def run(whole: Federation, stop_after: int | None = None) -> Finished:
    """A study, stopped once after a round's training and gone on with."""

    def observe(event: Event) -> None:
        closed = isinstance(event, StageClosed) and event.record.stage == "train"
        if closed and event.record.round == stop_after:  # type: ignore[union-attr]
            raise StoppedError

    if stop_after is not None:
        with pytest.raises(StoppedError):
            run_federation(whole, observe=observe)
    return run_federation(whole, resume=stop_after is not None)


QUICK = ("scaffold", "fedbn", "fedyogi", "ditto")


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PLANS],
)
def test_a_study_that_was_stopped_ends_with_the_same_bits(
    strategy: str, data: Path, tmp_path: Path
) -> None:
    plan = plan_of(strategy)
    ends = []
    for name, stop in (("whole", None), ("stopped", 2)):
        whole = tiny_federation(plan, cohorts_of(data, plan), tmp_path / name, tmp_path / "cache")
        server = run(whole, stop).state.server
        own = [used_at(whole, cohort.site, server.model) for cohort in whole.cohorts]
        parts = (server.model, server.second, server.control, *own)
        ends.append([digest_of(part) for part in parts if part is not None])
    assert ends[0] == ends[1]
    assert len(set(ends[0])) > 1 or strategy == "fedavgm"


def test_the_personal_part_never_travels_and_the_released_file_has_it(
    data: Path, tmp_path: Path
) -> None:
    plan = plan_of("fedbn")
    whole = tiny_federation(plan, cohorts_of(data, plan), tmp_path / "out", tmp_path / "cache")
    network = build_network(plan.model, plan.task)
    norms = {
        f"{name}.{own}"
        for name, layer in network.named_modules()
        if isinstance(layer, NORMS)
        for own, _ in layer.named_parameters(recurse=False)
    }
    assert set(whole.plan.built.personal) == norms
    assert norms.isdisjoint(spec.name for spec in whole.plan.built.updated)
    server = run(whole).state.server
    found = set()
    for cohort in whole.cohorts:
        folder = site_folder(whole.folder, cohort.site)
        header, stored = load_model(folder / "models" / "tiny.safetensors")
        assert header.arm == "personal"
        assert header.released == digest_of(server.model)
        for name in norms:
            np.testing.assert_array_equal(server.model[name], whole.initial[name])
        found.add(digest_of({name: stored[name] for name in norms}))
        shared = server.model.keys() - norms
        assert all(np.array_equal(stored[name], server.model[name]) for name in shared)
    assert len(found) == len(whole.cohorts)


def test_dittos_own_models_are_stored_beside_the_shared_one(data: Path, tmp_path: Path) -> None:
    plan = plan_of("ditto")
    whole = tiny_federation(plan, cohorts_of(data, plan), tmp_path / "out", tmp_path / "cache")
    server = run(whole).state.server
    for cohort in whole.cohorts:
        models = site_folder(whole.folder, cohort.site) / "models"
        assert load_model(models / "tiny.safetensors")[0].model_digest == digest_of(server.model)
        header, own = load_model(models / "tiny-own.safetensors")
        assert header.released == digest_of(server.model) != header.model_digest
        assert digest_of(used_at(whole, cohort.site, server.model)) == digest_of(own)


def test_the_servers_control_variate_is_the_mean_of_the_sites(data: Path, tmp_path: Path) -> None:
    plan = plan_of("scaffold")
    whole = tiny_federation(plan, cohorts_of(data, plan), tmp_path / "out", tmp_path / "cache")
    server = run(whole).state.server
    assert server.control is not None
    own = [
        Memories(site_folder(whole.folder, c.site) / "state", whole.plan).before(9).control
        for c in whole.cohorts
    ]
    assert max(float(np.abs(control).max()) for control in server.control.values()) > 1e-3
    for name, control in server.control.items():
        mean = np.mean([o[name].astype(np.float64) for o in own], axis=0)
        np.testing.assert_allclose(control, mean, rtol=0, atol=1e-5)
