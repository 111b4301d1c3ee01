"""Hospitals that crash, hang or send nonsense: the study goes on, and says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from tiny_studies import SITES, cohorts_of, lasting, tiny_federation, tiny_plan

from fedseg.aggregation.checkpoint import load_state
from fedseg.arrays import digest_of
from fedseg.errors import PlanError, RoundError
from fedseg.plan import StudyPlan
from fedseg.result import StageRecord, load_result
from fedseg.simulation import Options, simulate
from fedseg.simulation.federation import Federation
from fedseg.simulation.rehearsal import Broken, Fault, Kind, parse_fault
from fedseg.simulation.running import run_federation

CODES: dict[Kind, str] = {
    "crash": "crashed",
    "hang": "timeout",
    "nan": "not_finite",
    "shape": "malformed",
    "name": "malformed",
    "garbage": "malformed",
    "oversized": "malformed",
    "replay": "stale",
}
BROKEN = "hospital_b"
OTHERS = [site for site in SITES if site != BROKEN]


@pytest.fixture
def federation(data: Path, plan: StudyPlan, tmp_path: Path) -> Federation:
    """The tiny federation, nothing wrong with it."""
    return tiny_federation(plan, cohorts_of(data, plan), tmp_path / "f", tmp_path / "cache")


@pytest.fixture
def undisturbed_digest(undisturbed: tuple[Path, object], plan: StudyPlan) -> str:
    """The model of the study that nothing happened to."""
    return load_result(undisturbed[0] / "result.json").model_digest


def _training(history: tuple[StageRecord, ...]) -> dict[int, StageRecord]:
    """The stage of training that closed each round."""
    return {record.round: record for record in history if record.stage == "train"}


@pytest.mark.parametrize("kind", [kind for kind in get_args(Broken) if kind != "hang"])
def test_a_broken_site_is_named_and_the_others_count(
    kind: Kind, federation: Federation, undisturbed_digest: str
) -> None:
    faults = (Fault(site=BROKEN, kind=kind),)
    finished = run_federation(replace(federation, faults=faults))
    rounds = _training(finished.state.history)
    for round_, record in rounds.items():
        if kind == "replay" and round_ == 1:  # nothing to replay yet: the first answer is good
            assert not record.failures
            continue
        assert [(f.site, f.code) for f in record.failures] == [(BROKEN, CODES[kind])]
        assert [answer.site for answer in record.answers] == OTHERS
        assert record.failures[0].reason
    assert list(rounds) == [1, 2, 3]
    assert digest_of(finished.state.server.model) != undisturbed_digest


def test_a_broken_site_counts_for_as_much_as_one_that_is_not_there(federation: Federation) -> None:
    """The answers of the others are averaged among themselves, not with a zero."""
    for kind in ("crash", "nan"):
        broken = replace(
            federation,
            folder=federation.folder.with_name(kind),
            faults=(Fault(site=BROKEN, kind=kind),),
        )
        cohorts = tuple(cohort for cohort in federation.cohorts if cohort.site != BROKEN)
        absent = replace(
            federation, folder=federation.folder.with_name(f"no-{kind}"), cohorts=cohorts
        )
        one, other = run_federation(broken).state, run_federation(absent).state
        assert digest_of(one.server.model) == digest_of(other.server.model)


def test_a_site_that_hangs_is_not_waited_for(
    data: Path, tmp_path: Path, undisturbed_digest: str
) -> None:
    plan = tiny_plan(aggregation={"round_timeout_s": 4.0}, evaluation={"every_rounds": 3})
    federation = tiny_federation(plan, cohorts_of(data, plan), tmp_path / "f", tmp_path / "cache")
    fault = Fault(site=BROKEN, kind="hang", round=3)
    finished = run_federation(replace(federation, faults=(fault,)))
    rounds = _training(finished.state.history)
    assert [(f.site, f.code) for f in rounds[3].failures] == [(BROKEN, "timeout")]
    assert [answer.site for answer in rounds[3].answers] == OTHERS
    assert not rounds[1].failures + rounds[2].failures


def test_a_fault_of_one_round_leaves_the_site_in_the_others(federation: Federation) -> None:
    fault = Fault(site=BROKEN, kind="shape", round=2)
    finished = run_federation(replace(federation, faults=(fault,)))
    rounds = _training(finished.state.history)
    assert [len(rounds[n].answers) for n in (1, 2, 3)] == [4, 3, 4]


def test_failures_stand_in_the_result_and_in_the_report(
    data: Path, plan: StudyPlan, tmp_path: Path
) -> None:
    faults = (Fault(site=BROKEN, kind="crash", round=1), Fault(site=BROKEN, kind="nan", round=2))
    result = simulate(plan, data, tmp_path / "out", Options(faults=faults))
    assert result.rehearsed_faults == (f"{BROKEN}:crash@1", f"{BROKEN}:nan@2")
    read = load_result(tmp_path / "out" / "result.json")
    failures = [failure for record in read.stages for failure in record.failures]
    assert [(f.site, f.code) for f in failures] == [(BROKEN, "crashed"), (BROKEN, "not_finite")]
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    table = html[html.index('id="failures"') :]
    assert all(failure.reason in _plain(table) for failure in failures)


def _plain(html: str) -> str:
    """Jinja's quotes as they were."""
    return html.replace("&#39;", "'").replace("&#34;", '"')


@pytest.mark.parametrize("state", ["keep", pytest.param("reset", marks=pytest.mark.slow)])
def test_below_the_minimum_the_study_stops_and_can_go_on_as_if_nothing_had_been(
    state: str, data: Path, tmp_path: Path
) -> None:
    plan = tiny_plan(
        training={"optimiser": {"learning_rate": 0.02, "state": state}},
        aggregation={"strategy": "fedavgm", "server_momentum": 0.5, "weight_averaging": 0.5},
    )
    faults = tuple(
        Fault(site=site, kind=kind, round=2)
        for site, kind in (("hospital_a", "crash"), ("hospital_d", "nan"))
    )
    out = tmp_path / "out"
    with pytest.raises(RoundError) as stopped:
        simulate(plan, data, out, Options(faults=faults))
    message = str(stopped.value)
    assert "round 2, stage train: 3 sites must answer, 2 did, in 2 attempts" in message
    assert "hospital_a (crashed), hospital_d (not_finite)" in message
    assert "--resume" in message
    assert not (out / "result.json").exists()

    whole = simulate(plan, data, tmp_path / "whole")
    stored = load_state(out / "federated" / "checkpoint.safetensors", whole.plan)
    assert stored.position is not None
    assert (stored.position.round, stored.server.steps) == (2, 1)
    simulate(plan, data, out, Options(resume=True))
    resumed, never_failed = lasting(out), lasting(tmp_path / "whole")
    assert resumed["model"] == never_failed["model"]
    failed = [r for r in resumed["result"].pop("stages") if r["failures"]]
    assert [(r["round"], r["attempt"], len(r["failures"])) for r in failed] == [
        (2, 1, 2),
        (2, 2, 2),
    ]
    del never_failed["result"]["stages"]
    arms = [side["result"]["arms"][0] for side in (resumed, never_failed)]
    tried = [arm.pop("gradient_steps") for arm in arms]
    assert tried == [24 + 2 * 2 * 2, 24]  # two sites trained twice for nothing
    assert resumed["result"] == never_failed["result"]


def test_a_site_that_recovers_ends_where_it_would_have_ended(
    data: Path, tmp_path: Path, undisturbed_digest: str
) -> None:
    """Asked again, a site starts where it started the first time."""
    plan = tiny_plan(aggregation={"attempts": 3, "minimum_sites": 4})
    federation = tiny_federation(plan, cohorts_of(data, plan), tmp_path / "f", tmp_path / "cache")
    broken = replace(federation, faults=(Fault(site=BROKEN, kind="crash", round=2),))
    for _ in range(2):
        with pytest.raises(RoundError, match=r"in 3 attempts; failed: hospital_b \(crashed\)"):
            run_federation(broken, resume=True)
    finished = run_federation(federation, resume=True)
    assert digest_of(finished.state.server.model) == undisturbed_digest


@pytest.mark.parametrize("text", ["hospital_b", "hospital_b:burn", "hospital_b:nan@x", ":nan", ""])
def test_a_fault_that_reads_otherwise_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="SITE:KIND"):
        parse_fault(text)


def test_a_fault_at_a_site_that_is_not_there_is_refused(
    data: Path, plan: StudyPlan, tmp_path: Path
) -> None:
    options = Options(faults=(Fault(site="hospital_z", kind="nan"),))
    with pytest.raises(PlanError, match="hospital_z"):
        simulate(plan, data, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
