"""Numbers that a plan withholds: refused where a site tells them, and missed by nobody."""

from __future__ import annotations

from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from memory_grid import Kept, MemoryGrid, Site, Time
from pure_studies import SITES, reply, run_purely, train
from rich.console import Console
from small_plans import answer, body_of, built_plan, private_plan, tiny_model, withheld_body
from small_studies import NOW, write_built

from coordinator.commands.status_page import page as page_of
from coordinator.dashboard.notices import Situation
from coordinator.dashboard.page import render
from coordinator.folder import StudyFolder, new_settings
from coordinator.office.founding import found
from coordinator.progress.document import load_progress
from coordinator.progress.keeper import ProgressKeeper
from coordinator.rounds.study import Study
from coordinator.running.control import Snapshot
from fedseg.aggregation.checkpoint import load_state, save_state
from fedseg.aggregation.rounds import StudyState, first_state
from fedseg.arrays import digest_of
from fedseg.errors import PlanError
from fedseg.plan import StudyPlan
from fedseg.security.documents import stamp
from fedseg.updates import (
    AnswerError,
    Body,
    Enlisted,
    Evaluated,
    Received,
    Refused,
    Trained,
    open_answer,
    open_task,
    task_digest,
)
from sites.egress import permitted

PLAN = private_plan()
SCORES = {"dice": {"anterior": 0.75, "posterior": None}}
NOTHING = {"dice": {"anterior": None, "posterior": None}}
OPENNESS = ("none", "suppressed", "plain")


def _open(body: Body, plan: StudyPlan) -> Body:
    delta = tiny_model(1) if body.kind == "train" else None
    stage: Any = "train" if body.kind == "refused" else body.kind
    data = answer("a" * 64, "site_a", body, delta)
    model = digest_of(tiny_model())
    header, _ = open_answer(data, plan, task="a" * 64, stage=stage, site="site_a", model=model)
    return header.body


def _with(counts: str, losses: str, metrics: str, private: bool) -> StudyPlan:
    outputs = {"counts": counts, "losses": losses, "metrics": metrics, "suppress_below": 5}
    changes: dict[str, Any] = {"aggregation__weighting": "uniform", "privacy__outputs": outputs}
    if private:
        return PLAN.model_validate(
            private_plan().model_dump()
            | {"privacy": PLAN.privacy.model_dump() | {"outputs": outputs}}
        )
    return built_plan(privacy__guarantee="none", **changes)


@pytest.mark.parametrize(
    "body",
    [
        Enlisted(patients={"train": 7}, cases={"train": None}, left_out=None),
        Enlisted(patients={"train": None}, cases={"train": 7}, left_out=None),
        Enlisted(patients={"train": None}, cases={}, left_out=0),
        Enlisted(patients={}, cases={"test": 0}, left_out=None),
        Trained(patients=7, steps=20, loss=None),
        Trained(patients=None, steps=20, loss=0.5),
        Evaluated(patients=7, scores=NOTHING),
        Evaluated(patients=None, scores=SCORES),
        Refused(code="data"),
        Refused(code="not_finite"),
    ],
)
def test_a_number_that_the_plan_withholds_makes_an_answer_malformed(body: Body) -> None:
    with pytest.raises(AnswerError) as caught:
        _open(body, PLAN)
    assert caught.value.code == "malformed"


@pytest.mark.parametrize("stage", ["enlist", "train", "evaluate", "release"])
def test_an_answer_without_numbers_is_opened(stage: str) -> None:
    assert _open(withheld_body(stage, PLAN), PLAN) == withheld_body(stage, PLAN)


def test_a_hospital_may_withhold_more_than_the_plan() -> None:
    plan = built_plan(aggregation__weighting="uniform")
    for stage in ("enlist", "train", "evaluate"):
        assert _open(withheld_body(stage, plan), plan) == withheld_body(stage, plan)


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        (Trained(patients=5, steps=20, loss=0.5), True),
        (Trained(patients=4, steps=20, loss=None), False),
        (Trained(patients=None, steps=20, loss=0.5), True),
        (Evaluated(patients=4, scores=NOTHING), False),
        (Evaluated(patients=5, scores=SCORES), True),
        (Evaluated(patients=None, scores=SCORES), True),
        (Enlisted(patients={"train": 5, "val": None}, cases={"train": 9}, left_out=None), True),
        (Enlisted(patients={"train": 5, "val": 4}, cases={}, left_out=None), False),
        (Enlisted(patients={"train": None}, cases={"train": 9}, left_out=None), False),
        (Enlisted(patients={"train": 5}, cases={}, left_out=1), False),
    ],
)
def test_what_is_about_too_few_patients_is_refused(body: Body, taken: bool) -> None:
    plan = _with("suppressed", "suppressed", "suppressed", private=True)
    if taken:
        assert _open(body, plan) == body
        return
    with pytest.raises(AnswerError) as caught:
        _open(body, plan)
    assert caught.value.code == "malformed"


@pytest.mark.parametrize("private", [True, False])
def test_whatever_a_site_lets_out_the_coordinator_takes(private: bool) -> None:
    """Both ends read the same plan: every way to be open, and cohorts of any size."""
    for counts, losses, metrics in product(OPENNESS, OPENNESS, OPENNESS):
        plan = _with(counts, losses, metrics, private)
        for patients in (0, 1, 4, 5, 60):
            split = {"train": patients, "val": 9}
            for body in (
                Enlisted(patients=split, cases=split, left_out=2),
                Trained(patients=patients, steps=20, loss=0.5),
                Evaluated(patients=patients, scores=SCORES),
                Received(model=digest_of(tiny_model())),
            ):
                said = permitted(body, plan)
                assert _open(said, plan) == said
                if body != said:
                    with pytest.raises(AnswerError):
                        _open(body, plan)


def _study(
    tmp_path: Path, plan: StudyPlan = PLAN, telling: Site | None = None
) -> tuple[StudyState, ProgressKeeper, Kept]:
    """A whole study over a Grid in memory; `telling` is the third site's own way to answer."""

    def good(site: str) -> Site:
        return lambda task: reply(task, site, plan)

    sites = {11 + n: good(site) for n, site in enumerate(SITES)}
    if telling is not None:
        sites[13] = telling
    time, kept = Time(), Kept()
    start = first_state(plan, tiny_model())
    keeper = ProgressKeeper(tmp_path / "progress.json", plan, start, sites=SITES)
    runner = Study(MemoryGrid(sites, time), plan, kept, nodes=3, observe=keeper, clock=time.clock)
    state = runner.run(start)
    keeper.stored(state)
    return state, keeper, kept


def test_a_study_without_any_number_ends_as_the_pure_one(tmp_path: Path) -> None:
    state, keeper, _ = _study(tmp_path)
    pure = run_purely(first_state(PLAN, tiny_model()), PLAN)[-1]
    assert state.position is None
    assert digest_of(state.server.model) == digest_of(pure.server.model)
    assert [record.stage for record in state.history] == ["enlist", *["train"] * 3, "release"]
    assert not any(record.failures for record in state.history)
    for record in state.history[:-1]:
        assert [(a.patients, a.loss, a.scores) for a in record.answers] == [(None, None, {})] * 3
    document = keeper.document()
    assert [site.patients for site in document.sites] == [None] * 3
    assert not any(site.loss or site.dice for site in document.sites)
    assert [(stage.loss, stage.dice) for stage in document.stages] == [(None, None)] * 5


def test_states_and_progress_without_numbers_survive_their_files(tmp_path: Path) -> None:
    state, keeper, kept = _study(tmp_path)
    for each in (*kept.states, state):
        save_state(tmp_path / "state", PLAN, each)
        assert load_state(tmp_path / "state", PLAN).history == each.history
    read = load_progress(tmp_path / "progress.json")
    assert read is not None
    assert read.model_copy(update={"updated": keeper.document().updated}) == keeper.document()


@pytest.mark.parametrize("stage", ["enlist", "train"])
def test_a_site_that_tells_its_numbers_is_left_out_and_the_others_go_on(
    tmp_path: Path, stage: str
) -> None:
    def telling(task: bytes) -> bytes:
        header, model = open_task(task, PLAN)
        if header.stage != stage:
            return reply(task, "site_c", PLAN)
        delta = train("site_c", header.round, model) if stage == "train" else None
        return answer(task_digest(task), "site_c", body_of(stage, 4), delta)

    state, _, _ = _study(tmp_path, telling=telling)
    assert state.position is None
    failed = [(f.site, f.code) for r in state.history for f in r.failures if r.stage == stage]
    assert failed and {code for _, code in failed} == {"malformed"}
    assert {a.patients for r in state.history[:-1] for a in r.answers} == {None}
    trained = [record for record in state.history if record.stage == "train"]
    assert all([a.site for a in record.answers] == ["site_a", "site_b"] for record in trained)


def test_the_page_says_withheld_and_shows_the_guarantee(tmp_path: Path) -> None:
    _, keeper, _ = _study(tmp_path)
    page = render(PLAN, keeper.document(), Situation())
    assert page.count(">withheld</td>") == 2 * 3 + 2 * 3  # patients and Dice; Dice and loss a round
    assert ">withheld</dd>" in page and "the plan lets no hospital send it" in page
    assert page.count("(4, 0.001)-differential privacy for each patient") == 2
    assert "Withheld: the plan lets no hospital send its training loss or its Dice." in page
    assert "NONE" not in page and "None: images" not in page


def test_the_page_is_loud_where_there_is_no_guarantee(tmp_path: Path) -> None:
    plan = built_plan()
    _, keeper, _ = _study(tmp_path, plan)
    page = render(plan, keeper.document(), Situation())
    assert '<span class="loud">NONE</span>' in page
    assert "withheld" not in page.lower().replace("withheld:", "")


def test_a_hospital_that_withholds_by_itself_is_shown_so(tmp_path: Path) -> None:
    plan = built_plan(aggregation__weighting="uniform")

    def closed(task: bytes) -> bytes:
        header, model = open_task(task, plan)
        delta = train("site_c", header.round, model) if header.stage == "train" else None
        body = withheld_body(header.stage, plan, header.model)
        return answer(task_digest(task), "site_c", body, delta)

    _, keeper, _ = _study(tmp_path, plan, closed)
    page = render(plan, keeper.document(), Situation())
    row = page[page.index("site_c</th>") : page.index("</tr>", page.index("site_c</th>"))]
    assert row.count(">withheld<") == 2
    across = page[page.index('id="across"') :].split("</section>")[0]
    assert across.count(">withheld<") == 1
    assert page.count(">withheld<") == 3


def test_the_status_says_the_guarantee_and_what_is_withheld(tmp_path: Path) -> None:
    for plan, loud in ((PLAN, False), (built_plan(), True)):
        _, keeper, _ = _study(tmp_path, plan)
        seen = Snapshot(
            study="tiny",
            address="fl.example.org:443",
            daemon=None,
            paused=False,
            progress=keeper.document(),
            warnings=(),
        )
        console = Console(width=200, record=True, file=StringIO())
        console.print(page_of(seen, NOW))
        text = console.export_text()
        assert ("withheld" in text) is not loud
        assert ("NONE: images stay" in text) is loud
        assert ("(4, 0.001)-differential privacy" in text) is not loud


def test_a_private_study_is_not_founded_without_its_noise(tmp_path: Path) -> None:
    plan = PLAN.model_copy(update={"calibrated": None})
    path = write_built(tmp_path / "plan.json", plan)
    settings = new_settings(study="tiny", host="fl.example.org", created=stamp(NOW))
    with pytest.raises(PlanError, match="noise is not calibrated"):
        found(StudyFolder(tmp_path / "study"), path, settings, now=NOW)
    assert not (tmp_path / "study").exists()
