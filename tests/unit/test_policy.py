"""A policy restricts a plan, names its rule, and forbids everything when it cannot be read."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from small_plans import built_plan

from fedseg.errors import DataError, PrivacyError
from sites.policy import TEMPLATE, Policy, authorise, load_policy, open_at, rules

OPEN = Policy(privacy_none=True)


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
