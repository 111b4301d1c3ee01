"""A policy restricts a plan, names its rule, and forbids everything when it cannot be read."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from small_plans import built_plan, private_plan

from fedseg.errors import DataError, PrivacyError
from fedseg.evaluation.thresholds import Thresholds
from sites.policy import TEMPLATE, Policy, authorise, limits_of, load_policy, open_at, rules

OPEN = Policy(privacy_none=True)
PROMISE = {"privacy__epsilon": 8.0, "privacy__delta": 1e-5}


def policy_file(path: Path, text: str) -> Path:
    (path / "policy.yaml").write_text(text)
    return path / "policy.yaml"


def test_the_file_that_init_writes_is_the_default_and_forbids_no_guarantee(tmp_path: Path) -> None:
    policy = load_policy(policy_file(tmp_path, TEMPLATE))
    assert policy == Policy() and policy.privacy_none is False
    assert all(f"\n{name}: " in TEMPLATE for name in Policy.model_fields)
    with pytest.raises(PrivacyError, match="privacy_none") as caught:
        authorise(policy, built_plan())
    assert "reconstructed" in str(caught.value)
    authorise(OPEN, built_plan())


@pytest.mark.parametrize(
    ("rule", "limit"), [("largest_rounds", 2), ("largest_attempts", 1), ("smallest_cohort", 5)]
)
def test_a_refusal_names_its_rule_alone(rule: str, limit: int) -> None:
    plan = built_plan()
    with pytest.raises(PrivacyError, match=rule) as caught:
        authorise(OPEN.model_copy(update={rule: limit}), plan, 4)
    assert "privacy_none" not in str(caught.value)
    enough = {"largest_rounds": 3, "largest_attempts": 2, "smallest_cohort": 4}[rule]
    authorise(OPEN.model_copy(update={rule: enough}), plan, 4)


def test_every_broken_rule_is_named() -> None:
    strict = Policy(largest_rounds=1, largest_attempts=1)
    with pytest.raises(PrivacyError, match=r"privacy_none.*largest_rounds.*largest_attempts"):
        authorise(strict, built_plan())


def test_patients_that_are_not_counted_yet_break_nothing() -> None:
    found = rules(OPEN.model_copy(update={"smallest_cohort": 5}), built_plan(), None)
    assert [rule.broken for rule in found] == [None, None]


@pytest.mark.parametrize(
    "text",
    [
        "privacy_none: 1",
        "privacy_none: maybe",
        "privacy_nothing: true",
        "largest_rounds: 0",
        "largest_rounds: true",
        "largest_epsilon: 0",
        "largest_epsilon: .inf",
        "total_delta: 1",
        "counts: noised",
        "metrics: some",
        "hours: 20-06",
        "hours: '20:00-20:00'",
        "privacy_none: false\nprivacy_none: true",
        "- privacy_none",
        "a: &x 1\nb: *x",
        "\x00",
        "",
    ],
)
def test_a_policy_that_does_not_hold_allows_nothing(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"policy\.yaml"):
        load_policy(policy_file(tmp_path, text))


def test_no_policy_allows_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is allowed"):
        load_policy(tmp_path / "policy.yaml")


@pytest.mark.parametrize(
    ("hours", "time", "open_"),
    [
        ("20:00-06:00", "19:59", False),
        ("20:00-06:00", "20:00", True),
        ("20:00-06:00", "05:59", True),
        ("20:00-06:00", "06:00", False),
        ("08:00-17:30", "17:29", True),
        ("08:00-17:30", "17:30", False),
        ("08:00-17:30", "03:00", False),
    ],
)
def test_hours_may_cross_midnight(hours: str, time: str, open_: bool) -> None:
    moment = datetime.fromisoformat(f"2026-05-03T{time}:30").replace(tzinfo=UTC)
    assert open_at(Policy(hours=hours), moment) is open_
    assert open_at(Policy(), moment)


def test_the_template_allows_a_guarantee_and_only_what_it_covers() -> None:
    authorise(Policy(), private_plan(**PROMISE), 4)
    for output in ("counts", "losses", "metrics"):
        with pytest.raises(PrivacyError, match=f"{output} .*leave plain") as caught:
            authorise(Policy(), private_plan(**PROMISE, **{f"privacy__outputs__{output}": "plain"}))
        assert str(caught.value).count("; ") == 0


@pytest.mark.parametrize(
    ("rule", "limit", "enough"),
    [
        ("largest_epsilon", 7.9, 8.0),
        ("largest_delta", 1e-6, 1e-5),
        ("total_epsilon", 7.0, 8.0),
        ("total_delta", 1e-6, 1e-5),
        ("total_epsilon", None, 8.0),
        ("total_delta", None, 1e-4),
    ],
)
def test_a_budget_bounds_what_is_promised(rule: str, limit: float | None, enough: float) -> None:
    with pytest.raises(PrivacyError, match=rf": {rule} \("):
        authorise(Policy().model_copy(update={rule: limit}), private_plan(**PROMISE))
    authorise(Policy().model_copy(update={rule: enough}), private_plan(**PROMISE))
    authorise(OPEN.model_copy(update={rule: limit}), built_plan())


@pytest.mark.parametrize("output", ["counts", "losses", "metrics"])
@pytest.mark.parametrize(
    ("most", "asked", "kept"),
    [
        ("plain", "plain", True),
        ("suppressed", "plain", False),
        ("suppressed", "suppressed", True),
        ("none", "suppressed", False),
        ("none", "none", True),
    ],
)
def test_outputs_leave_as_openly_as_the_policy_says(
    output: str, most: str, asked: str, kept: bool
) -> None:
    changes = {f"privacy__outputs__{output}": asked, "aggregation__weighting": "uniform"}
    open_ = built_plan(privacy__guarantee="none", **changes)
    for plan in (open_, private_plan(**PROMISE, **changes)):
        policy = OPEN.model_copy(update={output: most})
        broken = [rule.name for rule in rules(policy, plan, 4) if rule.broken]
        assert broken == ([] if kept else [output])


def test_few_is_at_least_what_the_policy_calls_few() -> None:
    few = {"privacy__outputs__counts": "suppressed", "privacy__outputs__suppress_below": 4}
    plan = private_plan(**PROMISE, **few)
    with pytest.raises(PrivacyError, match="suppress_below"):
        authorise(Policy(counts="suppressed"), plan)
    authorise(Policy(counts="suppressed", suppress_below=4), plan)


def test_a_power_of_ten_is_a_number(tmp_path: Path) -> None:
    read = load_policy(policy_file(tmp_path, "largest_delta: 1e-5\ntotal_delta: 2E-05\n"))
    assert (read.largest_delta, read.total_delta) == (1e-5, 2e-5)


def test_a_file_that_is_silent_has_the_templates_budget(tmp_path: Path) -> None:
    silent = load_policy(policy_file(tmp_path, "privacy_none: true"))
    assert limits_of(silent) == limits_of(Policy())
    with pytest.raises(PrivacyError, match="total_epsilon"):
        limits_of(Policy(total_epsilon=None))
    within = limits_of(Policy(largest_epsilon=None, largest_delta=None))
    assert (within.study_epsilon, within.study_delta) == (within.total_epsilon, within.total_delta)


def test_thresholds_for_models_are_a_section_of_their_own(tmp_path: Path) -> None:
    text = TEMPLATE.replace(
        "acceptance: null", "acceptance:\n  dice_at_least: 0.8\n  patients_at_least: 20"
    )
    found = load_policy(policy_file(tmp_path, text)).acceptance
    assert found is not None and (found.dice_at_least, found.patients_at_least) == (0.8, 20)
    assert found.asked and not Thresholds(patients_at_least=20).asked
    example = "\n".join(
        line.removeprefix("# ")
        for line in TEMPLATE.splitlines()
        if line.startswith(("# acceptance:", "#   "))
    )
    whole = load_policy(policy_file(tmp_path, example)).acceptance
    assert whole is not None and None not in whole.model_dump().values()


@pytest.mark.parametrize("line", ["dice_at_least: 1.2", "dice: 0.8", "dice_at_least: high"])
def test_thresholds_that_mean_nothing_are_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match="acceptance"):
        load_policy(policy_file(tmp_path, f"acceptance:\n  {line}\n"))


def test_a_threshold_that_is_none_is_told_which_there_are(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("acceptance:\n  dice_at_leest: 0.8\n")
    with pytest.raises(DataError, match=r"acceptance.dice_at_leest: is no rule; .*dice_at_least,"):
        load_policy(path)
