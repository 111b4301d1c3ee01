"""Hospitals with some of the labels, from what they declare to what the coordinator makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from small_plans import answer, built_plan, tiny_model, values
from torch import nn

from fedseg.aggregation.rounds import Outcome, close_stage, first_state
from fedseg.container import peek
from fedseg.errors import DataError, PlanError, PrivacyError, RoundError, UntaughtLabelError
from fedseg.evaluation.metrics import score_case
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Case, Cohort
from fedseg.learning.losses import annotated_rows, dice_ce_per_patient
from fedseg.learning.persample.clipped import clipped_sum
from fedseg.learning.private import _Losses
from fedseg.plan import StudyPlan
from fedseg.result import SiteAnswer
from fedseg.simulation.partial import parse_without, withheld
from fedseg.updates import (
    AnswerError,
    AnswerHeader,
    Body,
    Enlisted,
    StageName,
    TaskHeader,
    open_answer,
    seal_task,
)
from sites.egress import permitted
from sites.trainer import Trainer

PLAN = built_plan()
BOTH = tuple(PLAN.task.labels)
TASK = "7" * 64


def enlisted(labels: tuple[str, ...] | None) -> Enlisted:
    return Enlisted(patients={"train": 4}, cases={"train": 4}, left_out=0, labels=labels)


def came(**labels: tuple[str, ...] | None) -> Outcome:
    answers = (SiteAnswer(site=s, patients=4, bytes_up=9, labels=own) for s, own in labels.items())
    return Outcome(0, tuple(answers), ())


def test_a_study_whose_labels_nobody_annotates_is_refused_before_its_first_round() -> None:
    start = first_state(PLAN, tiny_model())
    with pytest.raises(UntaughtLabelError, match="annotates posterior") as caught:
        close_stage(start, PLAN, came(site_a=("anterior",), site_b=("anterior",)))
    assert caught.value.labels == ("posterior",)
    assert "site_a: anterior; site_b: anterior" in str(caught.value)
    assert "have one that does on line, with the plan approved, and start" in str(caught.value)
    assert isinstance(caught.value, RoundError)
    for other in (("posterior",), None):
        state = close_stage(start, PLAN, came(site_a=("anterior",), site_b=other))
        assert state.position is not None and state.position.stage == "train"
        assert [a.labels for a in state.history[0].answers] == [("anterior",), other]


@pytest.mark.parametrize("labels", [(), ("liver",), ("anterior", "anterior"), (*BOTH, "x")])
def test_labels_that_are_not_the_plans_make_an_answer_malformed(labels: tuple[str, ...]) -> None:
    data = answer(TASK, "site_a", enlisted(labels))
    with pytest.raises(AnswerError, match="labels") as caught:
        open_answer(data, PLAN, task=TASK, stage="enlist", site="site_a")
    assert caught.value.code == "malformed"


@pytest.mark.parametrize("labels", [None, ("posterior",), BOTH])
def test_declared_labels_leave_as_they_are(labels: tuple[str, ...] | None) -> None:
    said = permitted(enlisted(labels), PLAN)
    assert isinstance(said, Enlisted) and said.labels == labels
    header, _ = open_answer(
        answer(TASK, "site_a", said), PLAN, task=TASK, stage="enlist", site="site_a"
    )
    assert header.body == said


def test_other_words_do_not_leave_as_labels() -> None:
    with pytest.raises(PrivacyError, match="names others than the plan's"):
        permitted(enlisted(("Mrs Smith",)), PLAN)


def test_a_label_that_is_not_annotated_has_no_metric_whatever_is_predicted() -> None:
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[1:3] = 1
    guess = truth.copy()
    guess[4] = 2
    labels, metrics = {"a": 1, "b": 2}, ("dice", "hd95", "nsd")
    whole = score_case(guess, truth, (1, 1, 1), labels, metrics, 1.0)
    part = score_case(guess, truth, (1, 1, 1), labels, metrics, 1.0, ("a",))
    assert whole["dice"] == {"a": 1.0, "b": 0.0}
    assert part == {metric: {"a": whole[metric]["a"], "b": None} for metric in metrics}


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    """Two patients whose segmentations hold both labels."""
    rng, cases = np.random.default_rng(0), []
    for name, split in (("p", "train"), ("q", "val")):
        image = rng.normal(size=(10, 10, 10)).astype(np.float32)
        drawn = np.zeros((10, 10, 10), np.uint8)
        drawn[2:5, 2:8, 2:8], drawn[5:8, 2:8, 2:8] = 1, 2
        paths = [tmp_path / f"{name}_{kind}.nii.gz" for kind in ("image", "label")]
        for path, array in zip(paths, (image, drawn), strict=True):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
        cases.append(Case(name, name, "site_a", split, (paths[0],), paths[1]))  # type: ignore[arg-type]
    return Cohort("site_a", tuple(cases))


def real_plan() -> tuple[StudyPlan, dict[str, Any]]:
    from fedseg.models.zoo import initial_model

    plan = StudyPlan.model_validate(values(training={"steps_per_round": 1}))
    record, tensors = initial_model(plan)
    return plan.model_copy(update={"initial": record}), tensors


def test_a_hospital_says_what_it_annotates_and_measures_nothing_else(
    cohort: Cohort, tmp_path: Path
) -> None:
    plan, model = real_plan()
    for labels in (None, ("posterior",)):
        own = cohort if labels is None else cohort.annotated_with(labels)
        place = tmp_path / str(labels)
        cache = CaseCache(place / "cache", plan.task)
        trainer = Trainer(plan, own, cache, place / "site", models=place / "models")

        def body(stage: StageName, round_: int, trainer: Trainer = trainer) -> Any:
            sent = {} if stage == "enlist" else model
            header = TaskHeader(
                study=plan.study, plan=plan.digest, round=round_, stage=stage, attempt=1,
                model=plan.built.digest if sent else None,
            )  # fmt: skip
            said: Body = peek(
                trainer.handle(seal_task(header, sent)), AnswerHeader, max_bytes=10**8
            ).body
            return said

        assert body("enlist", 0).labels == labels
        assert body("train", 1).loss > 0
        found = body("evaluate", 1).scores["dice"]
        assert found["posterior"] is not None
        assert (found["anterior"] is None) == (labels is not None)


def test_under_a_guarantee_the_patients_of_a_site_are_annotated_alike(cohort: Cohort) -> None:
    cohort.require_annotated_alike()
    cohort.annotated_with(["anterior"]).require_annotated_alike()
    one, two = cohort.cases
    mixed = Cohort("site_a", (replace(one, annotated=("anterior",)), two))
    with pytest.raises(DataError, match="one list of labels for all its patients"):
        mixed.require_annotated_alike()


@pytest.mark.parametrize("method", ["stored", "two-pass", "loop"])
def test_gradients_of_each_patient_follow_the_marginal_loss(method: Any) -> None:
    """Clipped sums against one backward a patient, by the loss of that patient alone."""
    chance = torch.Generator().manual_seed(0)
    labels = {"a": 1, "b": 2, "c": 3}
    rows = annotated_rows([("a", "c")], labels)
    assert rows is not None
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)).double()
    images = torch.randn(3, 1, 6, 6, generator=chance, dtype=torch.float64)
    target = torch.randint(0, 4, (3, 6, 6), generator=chance)
    target[target == 2] = 0
    found = clipped_sum(
        network, _Losses(rows), (images, target), torch.arange(3), 0.05, method=method
    )
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    plain = 0.0
    for i in range(3):
        part = slice(i, i + 1)
        loss = dice_ce_per_patient(network(images[part]), target[part], rows).sum()
        other = dice_ce_per_patient(network(images[part]), target[part])
        plain += float((loss - other).detach().abs())
        own = torch.autograd.grad(loss, list(network.parameters()))
        norm = torch.cat([g.flatten() for g in own]).norm()
        for name, gradient in zip(total, own, strict=True):
            total[name] += gradient * min(1.0, 0.05 / float(norm))
    assert plain > 1e-3
    for name, gradient in total.items():
        torch.testing.assert_close(found.sum[name], gradient, rtol=1e-6, atol=1e-9)


def test_withheld_labels_are_taken_from_the_named_hospitals_alone(cohort: Cohort) -> None:
    cohorts = (replace(cohort, site="a"), replace(cohort, site="b"))
    one, two = withheld(cohorts, PLAN.task, [("b", "anterior")])
    assert one is cohorts[0] and two.annotated == ("posterior",)
    assert withheld(cohorts, PLAN.task, ()) == cohorts
    for without, words in (
        ([("c", "anterior")], "'c', but the study's sites are a, b"),
        ([("a", "liver")], "'liver', but the study's labels are"),
        ([("a", name) for name in BOTH], "leaves a no label"),
    ):
        with pytest.raises(PlanError, match=words):
            withheld(cohorts, PLAN.task, without)


def test_what_is_withheld_is_written_as_site_and_label() -> None:
    assert parse_without("hospital_b:tumour") == ("hospital_b", "tumour")
    for text in ("hospital_b", ":x", "a:", ""):
        with pytest.raises(PlanError, match="SITE:LABEL"):
            parse_without(text)
