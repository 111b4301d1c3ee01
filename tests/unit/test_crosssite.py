"""Cross-site validation: the worst hospital first, the arithmetic right, the withheld named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_plans import built_plan
from study_results import make_plan, make_result

from fedseg.reports import crosssite
from fedseg.reports.crosssite import SiteScore, Standing, across, compared, sentences, simulated
from fedseg.reports.curves import points
from fedseg.reports.study import write_report
from fedseg.reports.traffic import by_round
from fedseg.result import SiteAnswer, StageRecord, StudyResult


def measuring(round_: int, *answers: SiteAnswer) -> StageRecord:
    return StageRecord(
        round=round_,
        stage="evaluate",
        attempt=1,
        bytes_down=1,
        bytes_up=1,
        answers=answers,
        failures=(),
    )


def told(site: str, dice: float | None, patients: int | None = 9) -> SiteAnswer:
    scores = {} if dice is None else {"dice": {"a": dice, "b": dice}}
    return SiteAnswer(site=site, patients=patients, scores=scores, bytes_up=1)


def score(site: str, dice: float, standing: Standing = "measured") -> SiteScore:
    return SiteScore(site, standing, {"dice": dice})


def test_the_worst_hospital_comes_first_and_the_mean_last() -> None:
    found = compared([score("a", 0.9), score("b", 0.6), score("c", 0.75)], round_=3)
    assert [s.site for s in found.scores] == ["b", "c", "a"]
    (dice,) = found.spread
    assert (dice.worst_site, dice.best_site) == ("b", "a")
    assert dice.mean == pytest.approx(0.75) and dice.gap == pytest.approx(0.15)
    assert dice.deviation == pytest.approx(0.15 * (2 / 3) ** 0.5)
    said = sentences(found)
    assert "worst at b" in said[0] and "mean over hospitals" in said[-1]


def test_for_a_distance_larger_is_worse() -> None:
    near, far = SiteScore("a", "measured", {"hd95": 2.0}), SiteScore("b", "measured", {"hd95": 9.0})
    (spread,) = compared([near, far], round_=1).spread
    assert (spread.worst_site, spread.worst, spread.gap) == ("b", 9.0, 3.5)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_the_spread_agrees_with_numpy(values: list[float]) -> None:
    (found,) = compared([score(f"s{k}", v) for k, v in enumerate(values)], round_=1).spread
    sample = np.asarray(values)
    assert found.deviation == pytest.approx(sample.std(), abs=1e-12)
    assert found.gap == pytest.approx(sample.mean() - sample.min(), abs=1e-12)
    assert found.worst <= found.mean + 1e-12 and found.mean <= found.best + 1e-12
    assert 1 / len(values) - 1e-9 <= found.jain <= 1 + 1e-9
    if (sample**2).sum() > 0:
        assert found.jain == pytest.approx(sample.sum() ** 2 / len(values) / (sample**2).sum())


def test_the_withheld_are_named_and_never_counted() -> None:
    plan = built_plan()
    stages = (
        measuring(2, told("a", 0.1), told("b", 0.2), told("c", 0.3)),
        measuring(3, told("a", 0.9), told("b", None, None), told("d", None, 0), told("e", 0.7)),
    )
    found = across(plan, stages, ["f"])
    assert found.round == 3
    assert found.named("measured") == ("e", "a")
    assert found.named("withheld") == ("b",)
    assert found.named("absent") == ("c", "d", "f")
    assert found.spread[0].mean == pytest.approx(0.8)
    said = " ".join(sentences(found))
    assert "Withheld: b. The worst hospital may be among those." in said
    assert "c, d and f" in said


def test_a_plan_that_withholds_metrics_leaves_every_hospital_named_as_withheld() -> None:
    plan = built_plan(privacy={"guarantee": "none", "outputs": {"metrics": "none"}})
    enlisted = measuring(0, told("a", None, 4), told("b", None, 4)).model_copy(
        update={"stage": "enlist"}
    )
    found = across(plan, (enlisted,))
    assert found.named("withheld") == ("a", "b") and found.spread == ()
    assert sentences(found) == (
        "No hospital’s number is known to the coordinator.",
        "Withheld: a and b. The worst hospital may be among those.",
    )


def test_a_hospital_that_tells_its_numbers_and_not_how_many_is_measured() -> None:
    (score,) = across(built_plan(), (measuring(1, told("a", 0.5, 0)),)).scores
    assert (score.standing, score.values) == ("measured", {"dice": 0.5})


def test_one_hospital_has_no_spread() -> None:
    assert compared([score("a", 0.9)], round_=1).spread == ()


def test_a_rule_that_passes_one_update_on_says_so() -> None:
    krum = {"strategy": "fedavg", "weighting": "uniform", "minimum_sites": 5, "rounds": 3}
    plan = built_plan(aggregation=krum | {"combine": {"rule": "krum", "byzantine": 1}})
    assert "one hospital alone" in crosssite.own_elsewhere(plan)
    assert "one hospital alone" not in crosssite.own_elsewhere(make_plan())


def test_a_simulation_is_compared_by_its_patients() -> None:
    result = make_result()
    found = simulated(result)
    assert found is not None
    federated = result.arm("federated")
    assert federated is not None
    by_hand = {
        site.name: np.mean([p.mean_dice for p in federated.of_site(site.name)])
        for site in result.sites
    }
    assert found.scores[0].site == min(by_hand, key=lambda site: by_hand[site])
    assert found.scores[0].values["dice"] == pytest.approx(min(by_hand.values()))
    assert {s.metric for s in found.spread} == {"dice", "hd95", "nsd"}


def test_the_report_names_the_worst_and_the_withheld(tmp_path: Path) -> None:
    result = make_result()
    last = [r for r in result.stages if r.stage == "evaluate"][-1]
    answers = (last.answers[0].model_copy(update={"scores": {}}), *last.answers[1:])
    changed = last.model_copy(update={"answers": answers})
    stages = tuple(changed if record is last else record for record in result.stages)
    html = _html(result.model_copy(update={"stages": stages}), tmp_path)
    section = html.split('id="across"')[1].split("</section>")[0]
    assert "fares worst at" in section and "<td>withheld</td>" in section
    assert "passed on to the others" in section


def test_the_report_has_a_row_for_each_own_model_and_names_whose_stayed(tmp_path: Path) -> None:
    plan = make_plan()
    asked = plan.evaluation.model_copy(update={"own_models": True})
    result = make_result(plan=plan.model_copy(update={"evaluation": asked}))
    first, second = (site.name for site in result.sites[:2])
    trained = max(i for i, r in enumerate(result.stages) if r.stage == "train")
    answers = tuple(
        answer.model_copy(update={"own": "1" * 64 if answer.site == first else None})
        for answer in result.stages[trained].answers
    )
    own = measuring(20, told(first, 0.9), told(second, 0.25)).model_copy(
        update={"stage": "own", "owner": first}
    )
    changed = result.stages[trained].model_copy(update={"answers": answers})
    stages = (*result.stages[:trained], changed, *result.stages[trained + 1 :], own)
    section = _html(result.model_copy(update={"stages": stages}), tmp_path)
    section = section.split('id="across"')[1].split("</section>")[0]
    row = section.split("Each hospital’s own model at every hospital")[1].split("</table>")[0]
    assert f'<th scope="row">{first}</th><td class="main">0.250</td>' in row
    assert "0.900" in row and "not told" in row
    assert "did not consent: the own model of hospital_2" in section
    assert "passed on to the others" not in section


def test_an_own_model_is_no_point_of_the_shared_ones_curves() -> None:
    result = make_result()
    own = measuring(20, told("hospital_1", 0.01)).model_copy(
        update={"stage": "own", "owner": "hospital_1"}
    )
    more = result.model_copy(update={"stages": (*result.stages, own)})
    assert tuple(points(more)) == tuple(points(result))
    assert by_round(more)[-1].dice == by_round(result)[-1].dice


def _html(result: StudyResult, folder: Path) -> str:
    write_report(result, (), folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")
