"""A private plan in plain language: what it promises is said in full, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_parties import Party
from small_plans import built_plan, private_plan
from small_sites import Consortium, Member, member
from typer.testing import CliRunner

from fedseg.plan import StudyPlan
from fedseg.promise import Calibration
from sites import cli
from sites.cohort import CohortRecord
from sites.decision import situation_of
from sites.explain import explain
from sites.outgoing import leaves
from sites.pledge import guaranteed

B, C = Party("hospital_b"), Party("hospital_c")


def _private(**changes: Any) -> StudyPlan:
    return private_plan(**changes)


def _leaving(plan: StudyPlan, record: CohortRecord | None = None) -> str:
    return " ".join(leaves(plan, record))


def _pledge(plan: StudyPlan, record: CohortRecord | None = None) -> str:
    return " ".join(guaranteed(plan, record))


def _record(**patients: int) -> CohortRecord:
    return CohortRecord.model_construct(patients=patients, left_out=0)


@pytest.fixture
def one(tmp_path: Path) -> Member:
    """A hospital that has joined a private study."""
    found = member(tmp_path)
    found.consortium = Consortium(plan=_private())
    found.join(B, C)
    return found


def test_a_hospital_reads_the_whole_guarantee(one: Member) -> None:
    shown = CliRunner().invoke(cli.app, ["plan", "show", "tiny", "--site", str(one.folder.path)])
    assert shown.exit_code == 0
    for words in (
        "(4, 0.001)-differential privacy for each patient of a hospital",
        "epsilon 4 and delta 0.001 for each patient of this hospital, over the whole study",
        "98.3 of 100 cases; blind guessing is right in 50",
        "1 in 1,000",
        "all images, slices, patches and augmentations of a person count as one",
        "Every training patient is in every step",
        "The noise is this hospital's own",
        "in each of 60 steps",
        "that gives epsilon 4 at delta 0.001 (two methods of accounting agree",
        "Covered: all numbers that leave in updates",
        "Not covered: a patient who is known to another hospital",
        "fedseg-site ledger show",
        "Whatever it does with them, and whichever models it sends",
    ):
        assert words in shown.output, words
    assert "NO privacy guarantee" not in shown.output
    assert "attempt the above" not in shown.output


def test_every_section_of_a_private_plan_is_there(one: Member) -> None:
    titles = [section.title for section in explain(situation_of(one.folder, "tiny"))]
    assert titles.index("The privacy guarantee") == titles.index("What leaves the hospital") + 1
    assert len(titles) == 9


def test_withheld_numbers_are_not_said_to_leave() -> None:
    text = _leaving(_private())
    assert "ready, and no number of patients or images" in text
    assert "Not told: how many patients were trained on and the training error." in text
    assert "is not measured for the study, and nothing about it leaves" in text
    for claim in ("mean training error", "the number of patients", "number of those", "left out"):
        assert claim not in text, claim


def test_what_leaves_plainly_is_said_and_not_covered() -> None:
    plan = _private(privacy__outputs={"counts": "plain", "losses": "plain", "metrics": "plain"})
    text = _leaving(plan, _record(train=9, val=3))
    assert "how many patients and images this hospital brings" in text
    assert "the number of patients trained on, the number of steps and the mean training" in text
    assert "Only 3 of your patients are held back: such a mean says much of each." in text
    assert "Not told" not in text
    said = _pledge(plan)
    assert said.count("sent plainly") == 3
    assert "No number about patients leaves outside" not in said


def test_what_is_said_of_a_hospitals_labels_is_in_what_leaves() -> None:
    plan = built_plan()
    begin = "which of the study's structures are drawn at this hospital"
    assert f"{begin}, as labels.yaml beside the data declares it" in _leaving(plan)
    whole = CohortRecord.model_construct(patients={}, annotated=None)
    assert f"{begin}: that all are (anterior and posterior), and no count" in _leaving(plan, whole)
    some = CohortRecord.model_construct(patients={}, annotated=("posterior",))
    text = _leaving(plan, some)
    assert f"{begin}: posterior, and no count of any." in text
    assert "everybody in the study can see that anterior is not drawn here" in text
    every = CohortRecord.model_construct(patients={}, annotated=("anterior", "posterior"))
    assert _leaving(plan, every) == _leaving(plan, whole)


def test_suppressed_numbers_say_from_how_many_patients_on() -> None:
    outputs = dict.fromkeys(("counts", "losses", "metrics"), "suppressed")
    plan = _private(privacy__outputs=outputs | {"suppress_below": 7})
    text = _leaving(plan, _record(train=9, val=3))
    assert text.count("where they are at least 7") == 5
    assert "Only 3 of your patients are held back: these means do not leave." in text
    assert "do not leave" not in _leaving(plan, _record(train=9, val=8))


def test_noised_metrics_are_said_with_their_own_epsilon() -> None:
    plan = _private(privacy__outputs={"metrics": "noised"}, privacy__expected_validation=3)
    assert "each with noise that the guarantee counts." in _leaving(plan)
    said = _pledge(plan)
    assert "Held-back patients are other people" in said
    assert "2 times, which gives epsilon 4 at delta 0.001 for each of them" in said
    assert "updates and quality figures" in said


def test_there_are_as_many_updates_as_rounds_whatever_is_asked() -> None:
    text = _leaving(_private())
    assert "In all at most 3 different updates" in text
    assert "at most 6 different updates (2 a round)" in _leaving(built_plan())


def test_the_time_of_an_answer_is_told() -> None:
    assert "how long the work took may tell" in _leaving(_private())
    held = _private(privacy__release_after_s=30.0)
    assert "leaves 30 seconds after its task came" in _leaving(held)
    assert "fixed: 30 seconds after the task" in _pledge(held)
    assert "does not fix when they leave" in _pledge(_private())


def test_a_draw_by_lot_is_told() -> None:
    plan = _private(privacy__rate=0.25)
    assert "drawn by lot with probability 0.25, independently" in _pledge(plan)
    assert "Every training patient is in every step" not in _pledge(plan)


def test_noise_that_is_too_weak_is_loud() -> None:
    plan = _private()
    weak = plan.model_copy(update={"calibrated": Calibration(training=plan.noise.training / 2)})
    said = _pledge(weak)
    assert "THE NOISE IS TOO WEAK: the plan promises epsilon 4" in said
    assert "cannot be approved" in said
    assert "THE NOISE IS TOO WEAK" not in _pledge(plan)
    unbuilt = plan.model_copy(update={"calibrated": None})
    assert "WHAT THE NOISE GIVES IS NOT KNOWN" in _pledge(unbuilt)


def test_a_delta_that_is_too_large_for_the_cohort_is_said() -> None:
    assert "as it is for your 40" in _pledge(_private(), _record(train=40, val=9))
    assert "which it is NOT for your 1000" in _pledge(_private(), _record(train=1000))


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(0.5, "a strong promise"), (3.0, "a middling promise"), (8.0, "a weak promise")],
)
def test_a_large_epsilon_is_not_praised(epsilon: float, words: str) -> None:
    assert words in _pledge(_private(privacy__epsilon=epsilon))


def test_the_trained_part_is_named(tmp_path: Path) -> None:
    one = member(tmp_path)
    one.consortium = Consortium(plan=_private(training__trainable="norms+head"))
    one.join(B, C)
    text = " ".join(explain(situation_of(one.folder, "tiny"))[1].lines)
    assert "of which those of the norm layers and of the last layer alone are trained" in text
    assert "4 image patches of every patient" in text
