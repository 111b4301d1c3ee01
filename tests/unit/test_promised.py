"""What a plan's noise gives: held against the promise, and counted up from what was done."""

from __future__ import annotations

from math import exp

import pytest
from small_plans import built_plan, private_plan

from fedseg.errors import PlanError, PrivacyError
from fedseg.plan import StudyPlan
from fedseg.privacy.accounting import epsilon_spent
from fedseg.privacy.mechanisms import Mechanism
from fedseg.privacy.promised import promised, record_of, require_kept
from fedseg.privacy.words import guessed_right, in_one_line, not_covered, outputs_of
from fedseg.promise import Calibration, LocalPrivacy
from fedseg.result import SiteAnswer, StageRecord


def _stages(*done: tuple[int, str, int], answered: bool = True) -> tuple[StageRecord, ...]:
    answers = (SiteAnswer(site="a", patients=None, bytes_up=1),) if answered else ()
    return tuple(
        StageRecord(
            round=round_,
            stage=stage,
            attempt=attempt,
            bytes_down=1,
            bytes_up=1,
            answers=answers,
            failures=(),
        )
        for round_, stage, attempt in done
    )


def _with_noise(plan: StudyPlan, training: float, metrics: float | None = None) -> StudyPlan:
    return plan.model_copy(update={"calibrated": Calibration(training=training, metrics=metrics)})


def test_the_calibrated_noise_keeps_the_promise_and_hardly_more() -> None:
    plan = private_plan()
    found = require_kept(plan)
    assert 3.95 < found.train.epsilon <= 4.0
    assert found.held_back is None
    assert found.train.mechanisms == (
        Mechanism(noise_multiplier=plan.noise.training, steps=3 * 20),
    )


def test_weaker_noise_than_promised_is_refused_and_counted() -> None:
    plan = private_plan()
    half = _with_noise(plan, plan.noise.training / 2)
    assert promised(half).train.epsilon > 8
    with pytest.raises(PrivacyError, match=r"promises epsilon 4 .* gives .*: run `fedseg plan b"):
        require_kept(half)


def test_noised_metrics_have_a_guarantee_of_their_own() -> None:
    plan = private_plan(privacy__outputs={"metrics": "noised"}, privacy__expected_validation=3)
    found = require_kept(plan)
    assert found.held_back is not None and 3.95 < found.held_back.epsilon <= 4.0
    assert found.held_back.mechanisms[0].steps == 2  # after rounds 2 and 3
    assert plan.noise.metrics is not None
    with pytest.raises(PrivacyError, match="noise for metrics"):
        require_kept(_with_noise(plan, plan.noise.training, plan.noise.metrics / 2))
    with pytest.raises(PrivacyError, match="names none"):
        require_kept(_with_noise(plan, plan.noise.training))


def test_a_plan_without_a_guarantee_has_none_to_keep() -> None:
    with pytest.raises(PlanError, match="no privacy guarantee"):
        promised(built_plan())
    assert record_of(built_plan(), ()) is None


def test_the_record_counts_rounds_and_not_attempts() -> None:
    plan = private_plan()
    stages = _stages((0, "enlist", 1), (1, "train", 1), (1, "train", 2), (2, "train", 1))
    found = record_of(plan, stages)
    assert found is not None and found.private
    unanswered = (*stages[:-1], *_stages((2, "train", 1), answered=False))
    assert record_of(plan, unanswered) == found
    work = Mechanism(noise_multiplier=plan.noise.training, steps=40)
    assert found.epsilon_spent == pytest.approx(epsilon_spent([work], 1e-3), abs=2e-4)
    assert found.epsilon_spent >= epsilon_spent([work], 1e-3)
    assert (found.epsilon, found.delta, found.epsilon_held_back) == (4.0, 1e-3, None)
    for word in ("Guarantee:", "Unit:", "Neighbours:", "Sampling:", "Noise:", "Not covered:"):
        assert word in found.text


def test_a_study_in_which_nothing_was_trained_spent_nothing() -> None:
    found = record_of(private_plan(), _stages((0, "enlist", 1)))
    assert found is not None and found.epsilon_spent == 0
    assert "nothing was spent" in found.text


def test_a_seeded_run_says_that_it_is_not_private_and_no_more() -> None:
    plan = private_plan(privacy__outputs={"metrics": "noised"}, privacy__expected_validation=3)
    stages = _stages((1, "train", 1), (2, "train", 1), (2, "evaluate", 1))
    found = record_of(plan, stages, private=False)
    assert found is not None and not found.private
    assert found.text.startswith("NOT PRIVATE")
    assert "Guarantee:" not in found.text
    honest = record_of(plan, stages)
    assert honest is not None and honest.epsilon_held_back
    assert honest.text.count("Guarantee:") == 2


def test_what_leaves_beside_the_guarantee_is_named() -> None:
    closed = private_plan()
    assert all(output.covered for output in outputs_of(closed))
    assert "No number" in not_covered(closed)
    some = private_plan(privacy__outputs={"counts": "plain", "metrics": "suppressed"})
    said = not_covered(some)
    assert "patients and images, sent plainly" in said
    assert "held-back patients, sent where it is about at least 5 patients" in said
    assert "training error" not in said
    record = record_of(some, _stages((1, "train", 1)))
    assert record is not None and said in record.text


def test_one_line_never_has_epsilon_without_delta_and_unit() -> None:
    assert in_one_line(private_plan()).startswith(
        "(4, 0.001)-differential privacy for each patient of a hospital"
    )
    assert in_one_line(built_plan()).startswith("None: ")


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0, 800.0])
def test_the_best_guess_is_the_least_sum_of_both_errors(epsilon: float) -> None:
    """On a grid of every test that (epsilon, delta) leaves possible."""
    privacy = LocalPrivacy(
        guarantee="local", epsilon=epsilon, delta=1e-3, clip_norm=1, expected_patients=9
    )
    wrong = [i / 20_000 for i in range(20_001)]
    factor = exp(min(epsilon, 700.0))
    missed = [max(0.0, 1 - 1e-3 - factor * f, (1 - 1e-3 - f) / factor) for f in wrong]
    best = 1 - min(m + f for m, f in zip(missed, wrong, strict=True)) / 2
    assert best <= guessed_right(privacy) <= best + 2e-3
