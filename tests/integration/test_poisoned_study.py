"""Hospitals that lie in whole studies: a robust rule holds, and liars are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_studies import cohorts_of, lasting, tiny_federation, tiny_plan, tiny_private_plan

from fedseg.aggregation.suspicions import suspicions
from fedseg.arrays import Arrays, digest_of
from fedseg.errors import PlanError
from fedseg.imaging.phantoms import write_phantoms
from fedseg.simulation import Options, simulate
from fedseg.simulation.attacks import ATTACKS
from fedseg.simulation.federation import Federation
from fedseg.simulation.rehearsal import Fault, parse_fault
from fedseg.simulation.running import Finished, run_federation

MEDIAN = {"combine": {"rule": "median"}, "weighting": "uniform", "rounds": 4, "minimum_sites": 5}
LIARS = ("hospital_a", "hospital_d")
UNLIKE = {"hospital_b"}  # honest, with another contrast than the rest: worth a look, too


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six hospitals of three patients."""
    folder = tmp_path_factory.mktemp("six")
    return write_phantoms(folder, sites=6, patients_per_site=[3] * 6, shape=(20, 20, 20))


def _federation(many: Path, folder: Path, **aggregation: object) -> Federation:
    plan = tiny_plan(aggregation={**MEDIAN, **aggregation}, evaluation={"every_rounds": 4})
    return tiny_federation(plan, cohorts_of(many, plan), folder / "f", folder / "cache")


def _away(one: Arrays, other: Arrays) -> float:
    """L2 distance between two models."""
    squares = (np.sum((one[n].astype(float) - other[n].astype(float)) ** 2) for n in one)
    return float(sum(squares)) ** 0.5


def _model(finished: Finished) -> Arrays:
    return finished.state.server.model


def test_two_liars_of_six_move_a_median_far_less_than_a_mean(many: Path, tmp_path: Path) -> None:
    faults = tuple(Fault(site=site, kind="sign_flip") for site in LIARS)
    moved = {}
    for rule in ("mean", "median"):
        federation = _federation(many, tmp_path / rule, combine={"rule": rule})
        clean = run_federation(federation)
        lied = run_federation(replace(federation, folder=tmp_path / rule / "l", faults=faults))
        moved[rule] = _away(_model(clean), _model(lied))
        assert set(suspicions(clean.state.history)) <= UNLIKE
        assert set(suspicions(lied.state.history)) - UNLIKE == set(LIARS)
        assert not (federation.folder / "scratch").exists()
    assert moved["median"] < moved["mean"] / 2


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_attack_is_the_same_whoever_is_served_first(
    kind: str, many: Path, tmp_path: Path
) -> None:
    faults = tuple(Fault.model_validate({"site": site, "kind": kind}) for site in LIARS)
    federation = replace(_federation(many, tmp_path, rounds=2), faults=faults)
    one = run_federation(federation)
    other = replace(federation, folder=tmp_path / "other")
    again = run_federation(other, arrange=lambda nodes: sorted(nodes, reverse=True))
    assert digest_of(_model(one)) == digest_of(_model(again))
    assert one.state.history == again.state.history
    twins = {a.site for r in one.state.history for a in r.answers if a.update_twin}
    assert twins == (set(LIARS) if kind == "alie" else set())
    honest = run_federation(replace(federation, folder=tmp_path / "h", faults=()))
    assert digest_of(_model(honest)) != digest_of(_model(one))


def test_a_study_that_was_attacked_says_so_in_its_report(many: Path, tmp_path: Path) -> None:
    faults = tuple(Fault(site=site, kind="sign_flip") for site in LIARS)
    plan = tiny_plan(aggregation=MEDIAN, evaluation={"every_rounds": 4})
    result = simulate(plan, many, tmp_path / "out", Options(faults=faults, finetune=None))
    assert set(suspicions(result.stages)) - UNLIKE == set(LIARS)
    page = (tmp_path / "out" / "report.html").read_text()
    for site in LIARS:
        assert f"{site}: its updates" in page
    assert "Look at its data before you exclude it" in page
    assert lasting(tmp_path / "out")["result"]["rehearsed_faults"] == [
        f"{site}:sign_flip" for site in LIARS
    ]


def test_a_second_training_is_not_rehearsed_under_a_guarantee(many: Path, tmp_path: Path) -> None:
    options = Options(faults=(parse_fault("hospital_b:label_swap"),))
    with pytest.raises(PlanError, match="no ledger pays for"):
        simulate(tiny_private_plan(), many, tmp_path / "out", options)
