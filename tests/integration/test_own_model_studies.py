"""Own models through whole studies: simulated, and between hospitals with keys; the same bits."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_hospitals
from memory_grid import Kept, MemoryGrid, Time
from small_hospitals import NOW, Consortium, Hospital, joined, phantoms, text
from small_hospitals import approved as _approved
from small_private_sites import PRIVACY
from test_resume import _kill_until_finished
from tiny_studies import cohorts_of, tiny_federation, tiny_plan

from coordinator.rounds.events import Event, StageClosed, nobody
from coordinator.rounds.study import Study
from coordinator.sealing.exchange import SealedExchange
from fedseg.aggregation.ownmodels import LetGo, OwnModels
from fedseg.aggregation.rounds import StudyState, first_state
from fedseg.arrays import digest_of
from fedseg.evaluation.evaluate import evaluate_cohort
from fedseg.imaging.cache import CaseCache
from fedseg.models.zoo import build_network, initial_model, load_tensors
from fedseg.plan import StudyPlan
from fedseg.privacy.schedule import calibrated
from fedseg.result import StageRecord, load_result, mean_scores
from fedseg.simulation.federation import Federation
from fedseg.simulation.running import run_federation
from sites.cohort import choose_cohort
from sites.folder import SiteFolder
from sites.founding import found
from sites.ledger import open_ledger

SITES = ("hospital_a", "hospital_b", "hospital_c")
OWN = {"evaluation": {"own_models": True}}


def plan_of(private: bool = False) -> tuple[StudyPlan, dict[str, Any]]:
    values = copy.deepcopy(small_hospitals.PLAN_VALUES)
    values["evaluation"]["own_models"] = True
    values["aggregation"] |= {"minimum_sites": 3}
    if private:
        values["training"] |= {"gradient_clip_norm": None, "mixed_precision": False}
        values["aggregation"] |= {"weighting": "uniform"}
        outputs = {"metrics": "suppressed", "suppress_below": 2}
        values["privacy"] = PRIVACY | {"outputs": outputs}
    plan = StudyPlan.model_validate(values)
    record, model = initial_model(plan)
    return plan.model_copy(update={"initial": record, "calibrated": calibrated(plan)}), dict(model)


class Deployed:
    """Three hospitals with folders, policies and gates; envelopes go between in memory."""

    def __init__(self, folder: Path, data: dict[str, Path], policies: dict[str, str], **of: bool):
        self.folder, self.consortium = folder, Consortium(*plan_of(**of))
        folders = {name: SiteFolder(folder / name) for name in SITES}
        owns = {name: found(folders[name], name, text(NOW)) for name in SITES}
        roll = self.consortium.roll(*owns.values())
        self.sites: dict[str, Hospital] = {}
        for name, own in owns.items():
            folders[name].policy.write_text(policies[name])
            joined(folders[name], self.consortium, roll)
            approve_as(name, folders[name], self.consortium, data[name])
            self.sites[name] = Hospital(folders[name], self.consortium, roll, own)
        (folder / "registry.json").write_bytes(roll.canonical_bytes)
        self.time, self.kept = Time(), Kept()
        gates = {name: (site, site.gate()) for name, site in self.sites.items()}
        doors = {11 + n: self.door(*gates[name]) for n, name in enumerate(SITES)}
        self.grid = MemoryGrid(doors, self.time)

    @staticmethod
    def door(site: Hospital, gate: Any) -> Callable[[bytes], bytes]:
        def carry(envelope: bytes) -> bytes:
            answer = site.ask(envelope, gate)
            return answer if isinstance(answer, bytes) else answer.read_bytes()

        return carry

    def run(
        self, state: StudyState | None = None, observe: Callable[[Event], None] = nobody
    ) -> StudyState:
        plan = self.consortium.plan
        exchange = SealedExchange(
            plan,
            self.consortium.key,
            registry=self.folder / "registry.json",
            outbox=self.folder / "outbox",
        )
        study = Study(
            self.grid,
            plan,
            self.kept,
            nodes=3,
            clock=self.time.clock,
            exchange=exchange,
            own_models=self.folder / "own",
            reask=True,
            observe=observe,
        )
        return study.run(state or first_state(plan, self.consortium.model))


def approve_as(name: str, folder: SiteFolder, consortium: Consortium, data: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_hospitals, "NAME", name)
        _approved(folder, consortium, data)


@pytest.fixture(scope="module")
def datas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of six patients each, the hospital's name taken out of its table."""
    whole = phantoms(tmp_path_factory.mktemp("phantoms"), patients=6)
    found = {}
    for name in SITES:
        found[name] = tmp_path_factory.mktemp("data") / name
        shutil.copytree(whole, found[name])
        table = found[name] / "sites.csv"
        table.write_text(table.read_text().replace("hospital_a", name))
    return found


def simulated(folder: Path, datas: dict[str, Path]) -> Federation:
    plan, model = plan_of()
    cohorts = tuple(choose_cohort(name, plan, datas[name]).cohort for name in SITES)
    return Federation(
        plan=plan, initial=model, cohorts=cohorts, folder=folder, cache=folder / "cache"
    )


def told(history: tuple[StageRecord, ...]) -> list[Any]:
    """A history less what depends on keys: sizes of messages, and heads of ledgers."""
    return [
        (record.model_dump(exclude={"bytes_down", "bytes_up", "answers"}), answers)
        for record in history
        for answers in [
            [a.model_copy(update={"bytes_up": 0, "head": None}) for a in record.answers]
        ]
    ]


OPEN = "privacy_none: true\n"
LETS = OPEN + "own_model_unprotected: true\n"


@pytest.mark.slow
def test_hospitals_with_keys_find_what_the_simulation_does(
    datas: dict[str, Path], tmp_path: Path
) -> None:
    deployed = Deployed(tmp_path / "real", datas, dict.fromkeys(SITES, LETS))
    real = deployed.run()
    whole = simulated(tmp_path / "simulated", datas)
    alike = run_federation(whole).state
    assert told(real.history) == told(alike.history)
    assert digest_of(real.server.model) == digest_of(alike.server.model)
    owners = [r.owner for r in real.history if r.owner is not None]
    assert owners == list(SITES)
    assert not (tmp_path / "real" / "own").exists()
    for name, site in deployed.sites.items():
        asked = [e.facts["owner"] for e in site.audited("task_received") if "owner" in e.facts]
        assert asked == owners
        assert any(
            field.startswith("body.consent.site=")
            for entry in site.audited("egress")
            for field in entry.facts["fields"]
        ), name


@pytest.mark.slow
def test_a_hospital_that_says_nothing_is_left_out_and_its_own_model_is_nowhere(
    datas: dict[str, Path], tmp_path: Path
) -> None:
    policies = dict.fromkeys(SITES, LETS) | {"hospital_b": OPEN}
    deployed = Deployed(tmp_path / "real", datas, policies)
    kept: list[str] = []

    def look(event: Event) -> None:
        if isinstance(event, StageClosed) and (tmp_path / "real" / "own").exists():
            kept.extend(path.name for path in (tmp_path / "real" / "own").iterdir())

    end = deployed.run(observe=look)
    own = {r.owner: [a.site for a in r.answers] for r in end.history if r.owner is not None}
    assert own == {"hospital_a": list(SITES), "hospital_c": list(SITES)}
    assert set(kept) == {"hospital_a.own", "hospital_c.own"}


@pytest.mark.slow
def test_under_a_guarantee_own_models_cost_nobody_anything(
    datas: dict[str, Path], tmp_path: Path
) -> None:
    policy = "own_model_guaranteed: true\nmetrics: suppressed\nsuppress_below: 2\n"
    deployed = Deployed(tmp_path / "real", datas, dict.fromkeys(SITES, policy), private=True)
    end = deployed.run()
    own = {r.owner: [a.mean_dice for a in r.answers] for r in end.history if r.owner is not None}
    assert set(own) == set(SITES)
    assert all(dice is not None for dices in own.values() for dice in dices)
    for site in deployed.sites.values():
        ledger = open_ledger(site.folder, site.signing, lambda: text(NOW))
        assert len(ledger.book.debits) == deployed.consortium.plan.aggregation.rounds


class StoppedError(Exception):
    """The coordinator's process ends here."""


@pytest.mark.parametrize(
    "after",
    [
        "train",
        *(pytest.param(site, marks=pytest.mark.slow) for site in ("hospital_a", "hospital_c")),
    ],
)
def test_a_coordinator_killed_between_own_models_goes_on(
    after: str, datas: dict[str, Path], tmp_path: Path
) -> None:
    whole = run_federation(simulated(tmp_path / "whole", datas)).state

    def stop(event: Event) -> None:
        if not isinstance(event, StageClosed) or event.record.round < 3:
            return
        if after in (event.record.owner, event.record.stage):
            raise StoppedError

    federation = simulated(tmp_path / "stopped", datas)
    with pytest.raises(StoppedError):
        run_federation(federation, observe=stop)
    again = run_federation(federation, resume=True).state
    assert told(again.history) == told(whole.history)
    assert digest_of(again.server.model) == digest_of(whole.server.model)
    assert not (federation.folder / "own").exists()


@pytest.mark.slow
def test_killed_simulations_end_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    _kill_until_finished(tmp_path, data, tiny_plan(**OWN), 6)
    assert not list((tmp_path / "out").rglob("*.own"))
    result = load_result(tmp_path / "out" / "whole" / "result.json")
    assert len(result.own_models) == 4
    assert "own model" in (tmp_path / "out" / "whole" / "report.html").read_text("utf-8")


def test_the_numbers_are_those_of_the_last_model_with_one_update(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An own model that was kept, measured anew without a federation."""
    plan = tiny_plan(**OWN)
    federation = tiny_federation(plan, cohorts_of(data, plan), tmp_path / "f", tmp_path / "cache")
    kept: dict[str, dict[str, Any]] = {}
    keep = OwnModels.keep

    def copy_too(self: OwnModels, let_go: LetGo, model: Any) -> None:
        kept[let_go.consent.site] = {name: array.copy() for name, array in model.items()}
        keep(self, let_go, model)

    monkeypatch.setattr(OwnModels, "keep", copy_too)
    history = run_federation(federation).state.history
    own = {r.owner: {a.site: a.scores for a in r.answers} for r in history if r.owner is not None}
    network = build_network(federation.plan.model, federation.plan.task)
    cache = CaseCache(federation.cache, federation.plan.task)
    load_tensors(network, kept["hospital_a"])
    for cohort in federation.cohorts[:2]:
        scores = evaluate_cohort(network, cohort.split("val"), cache, federation.plan, ("dice",))
        assert own["hospital_a"][cohort.site] == mean_scores(scores, ("dice",))
