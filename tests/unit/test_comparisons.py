"""Two models on the same patients: intervals, p values, Holm, and what may be said."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_validations import patient, patients

from fedseg.evaluation.comparisons import (
    compare,
    holm,
    outcome_of,
    sign_flip_p,
    turned,
    volume_error_percent,
)
from fedseg.evaluation.evidence import Comparison, Estimate, Outcome

BASE = [0.80, 0.82, 0.85, 0.78, 0.90, 0.88, 0.86, 0.83, 0.79, 0.87]


def dice_of(found: tuple[Comparison, ...]) -> list[Comparison]:
    return [each for each in found if each.measure == "dice"]


def compared(*gains: float, base: list[float] = BASE) -> Comparison:
    """A model that gains this much in each patient, against one that does not."""
    gained = [b + g for b, g in zip(base, gains, strict=True)]
    a, b = patients("finetuned", gained), patients("global", base)
    (found,) = dice_of(compare({"finetuned": a, "global": b}))
    return found


def test_a_gain_in_every_patient_is_better_and_seen_from_the_other_worse() -> None:
    found = compared(*np.linspace(0.02, 0.04, 10))
    assert found.outcome == "better" and found.a_higher == 10 and found.b_higher == 0
    assert found.difference.mean == pytest.approx(0.03)
    assert found.p == pytest.approx(2 / 2**10) == found.p_adjusted
    back = turned(found)
    assert (back.a, back.outcome) == ("global", "worse")
    assert back.difference.low == pytest.approx(-found.difference.high)  # type: ignore[operator]
    assert turned(back) == found


def test_equal_models_are_not_worse_and_wild_ones_undecided() -> None:
    assert compared(*[0.0] * 10).outcome == "not worse"
    assert compared(*[0.001, -0.001] * 5).outcome == "not worse"
    assert compared(*[0.05, -0.05] * 5).outcome == "undecided"


def test_half_a_point_below_is_where_not_worse_ends() -> None:
    def of(low: float, high: float, p: float) -> Outcome:
        difference = Estimate(patients=9, mean=(low + high) / 2, low=low, high=high)
        found = compared(*[0.0] * 10)
        return outcome_of(found.model_copy(update={"difference": difference, "p_adjusted": p}))

    assert of(-0.0049, 0.01, 0.9) == "not worse"
    assert of(-0.0050, 0.01, 0.9) == "undecided"
    assert of(-0.0060, -0.001, 0.01) == "worse"
    assert of(-0.0060, -0.001, 0.06) == "undecided"
    assert of(0.0010, 0.01, 0.01) == "better"
    assert of(0.0010, 0.01, 0.06) == "not worse"


def test_five_patients_decide_nothing_however_large_the_gain() -> None:
    found = compared(*[0.3] * 5, base=BASE[:5])
    assert found.outcome == "undecided" and found.p is None and found.difference.low is None


def test_a_patient_without_a_value_under_one_of_two_is_left_out_and_counted() -> None:
    a = patients("a", [None, None, *BASE])
    b = patients("b", [0.5, None, *BASE])
    (found,) = dice_of(compare({"a": a, "b": b}))
    assert found.unpaired == 1 and found.difference.patients == 10


def test_dice_is_a_family_of_its_own() -> None:
    gains = np.linspace(0.02, 0.04, 10)
    rows = {"a": gains * 2, "b": gains, "c": gains * 0}
    found = compare(
        {name: patients(name, (np.array(BASE) + gain).tolist()) for name, gain in rows.items()}
    )
    dice = dice_of(found)
    assert [(each.a, each.b) for each in dice] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [each.p_adjusted for each in dice] == pytest.approx([3 * 2 / 2**10] * 3)
    others = [each for each in found if each.measure != "dice"]
    assert len(others) == 9 and all(each.outcome is None for each in others)
    assert {each.p for each in others} == {1.0}


def test_volume_errors_are_without_sign_and_over_labels_that_are_there() -> None:
    assert volume_error_percent(patient("P", 0.9)) == pytest.approx(10.0)
    assert volume_error_percent(patient("P", 0.9, label={"predicted_ml": 7.0})) == pytest.approx(30)
    assert volume_error_percent(patient("P", 0.9, label={"volume_ml": 0.0})) is None


DIFFERENCES = st.lists(st.integers(-50, 50).map(lambda i: i / 1000), min_size=2, max_size=9)


@settings(max_examples=40, deadline=None)
@given(DIFFERENCES)
def test_the_sign_flip_test_agrees_with_flipping_every_sign(differences: list[float]) -> None:
    sample = np.array(differences)
    flips = np.array(list(product((1, -1), repeat=len(sample)))) * sample
    means = flips.mean(axis=1)
    at_least = 2 * min(
        np.mean(means >= sample.mean() - 1e-12), np.mean(means <= sample.mean() + 1e-12)
    )
    assert sign_flip_p(differences) == pytest.approx(min(1.0, at_least))


def test_many_patients_are_flipped_by_chance_and_repeatably() -> None:
    values = np.random.default_rng(0).normal(0.005, 0.01, 40).tolist()
    found = sign_flip_p(values)
    assert found is not None and found == sign_flip_p(values)
    from scipy import stats

    assert found == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.01)
    assert sign_flip_p([0.0] * 8) == 1.0 and sign_flip_p([0.5]) is None


@settings(max_examples=15, deadline=None)
@given(st.lists(st.none() | st.floats(0, 1), max_size=8))
def test_holm_agrees_with_its_definition(p_values: list[float | None]) -> None:
    known = sorted(p for p in p_values if p is not None)
    for p, adjusted in zip(p_values, holm(p_values), strict=True):
        if p is None:
            assert adjusted is None
            continue
        last = len(known) - known[::-1].index(p)
        steps = [min(1.0, (len(known) - i) * q) for i, q in enumerate(known[:last])]
        assert adjusted == pytest.approx(max(steps), abs=1e-12)
