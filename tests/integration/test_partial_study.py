"""A study in which no hospital annotates every label, from the data to the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_studies import SITES, tiny_plan, tiny_private_plan

from fedseg.errors import UntaughtLabelError
from fedseg.result import StudyResult
from fedseg.simulation import Options, simulate

LOST = (("hospital_a", "head"), ("hospital_b", "body"))
LOST += (("hospital_c", "head"), ("hospital_d", "body"))


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    out = tmp_path_factory.mktemp("partial") / "study"
    plan = tiny_plan(aggregation={"rounds": 2, "minimum_sites": 3})
    options = Options(baselines=("pooled", "local"), without=LOST, finetune=None)
    return out, simulate(plan, data, out, options)


def test_hospitals_say_what_they_annotate_and_score_nothing_else(
    study: tuple[Path, StudyResult],
) -> None:
    left = {"head": ("body",), "body": ("head",)}
    own = {site: left[label] for site, label in LOST}
    result = study[1]
    enlist, *_ = result.stages
    assert {a.site: a.labels for a in enlist.answers} == own
    assert {site.name: site.annotated for site in result.sites} == own
    (measured,) = [record for record in result.stages if record.stage == "evaluate"]
    for answer in measured.answers:
        known = {label for label, dice in answer.scores["dice"].items() if dice is not None}
        assert known == set(own[answer.site])


def test_every_arm_is_measured_on_all_that_is_drawn(study: tuple[Path, StudyResult]) -> None:
    """Pooled patients of hospitals with other labels share batches."""
    result = study[1]
    assert [arm.name for arm in result.arms] == ["federated", "pooled", "local"]
    for arm in result.arms:
        assert {p.site for p in arm.patients} == set(SITES)
        assert all(p.dice["head"] is not None and p.dice["body"] is not None for p in arm.patients)


def test_the_report_says_who_annotates_what(study: tuple[Path, StudyResult]) -> None:
    page = (study[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("body; not annotated here: head") == 2
    assert page.count("head; not annotated here: body") == 2


def test_noised_metrics_of_a_hospital_without_all_labels_leave(data: Path, tmp_path: Path) -> None:
    plan = tiny_private_plan(aggregation={"rounds": 1}, training={"schedule": {"warmup_rounds": 0}})
    result = simulate(plan, data, tmp_path / "out", Options(without=LOST[:2], finetune=None))
    (measured,) = [record for record in result.stages if record.stage == "evaluate"]
    known = {
        answer.site: {label for label, dice in answer.scores["dice"].items() if dice is not None}
        for answer in measured.answers
    }
    assert known == {site: {"head", "body"} for site in SITES} | {
        "hospital_a": {"body"}, "hospital_b": {"head"},
    }  # fmt: skip


def test_a_label_that_no_hospital_annotates_stops_the_study(data: Path, tmp_path: Path) -> None:
    options = Options(without=tuple((site, "head") for site in SITES), finetune=None)
    with pytest.raises(UntaughtLabelError, match="annotates head"):
        simulate(tiny_plan(), data, tmp_path / "out", options)
