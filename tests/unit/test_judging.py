"""Thresholds and paired comparisons become a verdict that few patients cannot talk up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from small_validations import EMPTY, patient, patients

from fedseg.evaluation.comparisons import compare
from fedseg.evaluation.judging import judge
from fedseg.evaluation.observations import PatientValidation
from fedseg.evaluation.summaries import agreements, summarise
from fedseg.evaluation.thresholds import Thresholds
from fedseg.evaluation.validation import Verdict

BASE = np.linspace(0.80, 0.92, 12)
JITTER = np.array([0.001, -0.001] * 6)
WILD = np.array([0.05, -0.05] * 6)


def judged(rows: dict[str, Sequence[PatientValidation]], thresholds: Thresholds | None) -> Verdict:
    summaries = [summarise(name, own) for name, own in rows.items()]
    agreement = [each for name, own in rows.items() for each in agreements(name, own)]
    return judge(summaries, compare(rows), agreement, thresholds)


def rows_of(**dice: Any) -> dict[str, Sequence[PatientValidation]]:
    return {name: patients(name, np.asarray(values).tolist()) for name, values in dice.items()}


LOW = Thresholds(dice_at_least=0.7, patients_at_least=10)


def test_of_models_that_are_not_worse_the_simplest_is_recommended() -> None:
    verdict = judged(rows_of(finetuned=BASE + JITTER, local=BASE, **{"global": BASE}), LOW)
    assert (verdict.decision, verdict.recommended, verdict.established) == ("go", "global", True)
    assert "simplest" in verdict.reasons[0] and "not worse than finetuned" in verdict.reasons[0]
    assert {check.threshold for check in verdict.checks} == {"dice_at_least", "patients_at_least"}


def test_a_better_model_is_recommended_over_a_simpler_one() -> None:
    rows = rows_of(finetuned=BASE + 0.03 + JITTER, **{"global": BASE})
    verdict = judged(rows, LOW)
    assert (verdict.decision, verdict.recommended, verdict.established) == ("go", "finetuned", True)
    assert "better than global (Dice +0.030" in verdict.reasons[0]


def test_where_nothing_is_shown_the_highest_mean_is_no_more_than_that() -> None:
    verdict = judged(rows_of(finetuned=BASE + WILD + 0.001, **{"global": BASE}), LOW)
    assert (verdict.recommended, verdict.established) == ("finetuned", False)
    assert "might turn the order" in verdict.reasons[0]


@pytest.mark.parametrize("thresholds", [None, Thresholds(), Thresholds(patients_at_least=3)])
def test_without_thresholds_nothing_is_go(thresholds: Thresholds | None) -> None:
    verdict = judged(rows_of(**{"global": BASE}), thresholds)
    assert verdict.decision == "undecided" and verdict.recommended == "global"
    assert any("no thresholds were set" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("limit", "decision"), [(0.80, "go"), (0.86, "undecided"), (0.95, "no-go")]
)
def test_a_mean_meets_a_threshold_with_all_of_its_interval(limit: float, decision: str) -> None:
    verdict = judged(rows_of(**{"global": BASE}), Thresholds(dice_at_least=limit))
    assert verdict.decision == decision


@pytest.mark.parametrize(
    ("asked", "decision", "met"),
    [
        ({"worst_case_dice_at_least": 0.8}, "go", "met"),
        ({"worst_case_dice_at_least": 0.801}, "no-go", "broken"),
        ({"hd95_mm_at_most": 2.0}, "go", "met"),
        ({"hd95_mm_at_most": 1.9}, "no-go", "broken"),
        ({"volume_bias_percent_at_most": 10.0}, "go", "met"),
        ({"volume_bias_percent_at_most": 9.9}, "no-go", "broken"),
        ({"failures_share_at_most": 0.0}, "go", "met"),
        ({"dice_at_least": 0.7, "patients_at_least": 13}, "undecided", "undecided"),
    ],
)
def test_each_threshold_decides(asked: dict[str, Any], decision: str, met: str) -> None:
    verdict = judged(rows_of(**{"global": BASE}), Thresholds.model_validate(asked))
    assert verdict.decision == decision
    assert met in {check.met for check in verdict.checks}
    assert (decision == "go") == all(check.met == "met" for check in verdict.checks)


def test_a_candidate_that_breaks_a_threshold_is_passed_over() -> None:
    rows = rows_of(finetuned=BASE, **{"global": BASE})
    rows["global"] = [*rows["global"][:-1], patient("P11", 0.92, failures=(EMPTY,))]
    verdict = judged(rows, Thresholds(failures_share_at_most=0.05))
    assert (verdict.decision, verdict.recommended) == ("go", "finetuned")
    assert "global broke a threshold and was passed over" in " ".join(verdict.reasons)
    assert "1 of 12 predictions failed" in next(
        check.words for check in verdict.checks if check.candidate == "global"
    )


def test_a_worse_model_that_takes_the_place_of_a_better_one_is_said_to_be_worse() -> None:
    rows = rows_of(finetuned=BASE, **{"global": BASE - 0.1 + JITTER})
    rows["finetuned"] = [*rows["finetuned"][:-1], patient("P11", 0.92, failures=(EMPTY,))]
    verdict = judged(rows, Thresholds(failures_share_at_most=0.05))
    assert (verdict.decision, verdict.recommended) == ("go", "global")
    assert not verdict.established
    assert "although global is worse than finetuned (Dice -0.100)" in " ".join(verdict.reasons)


def test_where_all_break_a_threshold_it_is_no_go_and_says_why_first() -> None:
    verdict = judged(
        rows_of(finetuned=BASE, **{"global": BASE}), Thresholds(worst_case_dice_at_least=0.9)
    )
    assert verdict.decision == "no-go" and "worst_case_dice_at_least (0.9)" in verdict.reasons[0]


def test_five_patients_recommend_nothing_and_are_never_go() -> None:
    rows = rows_of(**{"global": BASE[:5]})
    verdict = judged(rows, Thresholds(dice_at_least=0.1, worst_case_dice_at_least=0.1))
    assert (verdict.decision, verdict.recommended) == ("undecided", None)
    assert "5 patients were measured" in verdict.reasons[0]


def test_five_patients_can_break_what_is_held_as_measured() -> None:
    rows = rows_of(**{"global": BASE[:5]})
    verdict = judged(rows, Thresholds(worst_case_dice_at_least=0.9))
    assert verdict.decision == "no-go" and verdict.recommended is None
    both = rows_of(finetuned=BASE[:5] + 0.15, **{"global": BASE[:5]})
    assert judged(both, Thresholds(worst_case_dice_at_least=0.9)).decision == "undecided"


def test_two_files_of_one_kind_are_as_simple_as_their_kind() -> None:
    rows = rows_of(**{"finetuned (a)": BASE, "finetuned (b)": BASE, "global": BASE})
    assert judged(rows, LOW).recommended == "global"
