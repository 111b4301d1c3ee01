"""The benchmark of strategies pairs persons, and reads 99 % where the curve first comes to it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedseg.evaluation.evidence import Estimate
from fedseg.result import SiteAnswer, StageRecord

FOLDER = Path(__file__).parents[2] / "benchmarks"
SEEDS, PERSONS = (1, 2), 8


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("strategies")


def run_of(arm: str, seed: int, part: str, dice: Any) -> dict[str, Any]:
    """A stored result: each part has persons of its own at both hospitals."""
    patients = [
        {"site": site, "patient": f"{part}-{n}", "cases": 1, "dice": {"x": value}}
        for site, values in zip("ab", dice, strict=True)
        for n, value in enumerate(values)
    ]
    return {"arm": arm, "seed": seed, "part": part, "patients": patients}


def test_a_person_counts_once_however_many_seeds_and_is_held_against_themselves(
    script: ModuleType,
) -> None:
    rng = np.random.default_rng(3)
    dice = {
        arm: rng.uniform(0.7, 0.9, size=(len(SEEDS), 2, 2, PERSONS))
        for arm in ("local", "fedavg", "fedavg+full")
    }
    results = [
        run_of(arm, seed, str(part), values[s, part])
        for arm, values in dice.items()
        for s, seed in enumerate(SEEDS)
        for part in range(2)
    ]
    pairs = {(p["a"], p["b"], p["site"]): p for p in script.compared(results)}
    assert {key[:2] for key in pairs} == {
        ("fedavg+full", "fedavg"),
        ("fedavg", "local"),
        ("fedavg+full", "local"),
    }
    for (a, b, site), pair in pairs.items():
        by_person = (dice[a] - dice[b]).mean(0)  # part, site, person
        wanted = by_person if site == "all" else by_person[:, "ab".index(site)]
        assert pair["persons"] == wanted.size
        assert pair["mean"] == pytest.approx(wanted.mean())
        assert pair["standardised"] == pytest.approx(wanted.mean() / wanted.std(ddof=1))
        assert pair["low"] < pair["mean"] < pair["high"]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.004, 0.001, "not worse"),
        (-0.02, 0.01, "undecided"),
        (-0.12, -0.08, "worse"),
        (-0.001, -0.0001, "not worse"),
        (None, None, "undecided"),
    ],
)
def test_an_arm_that_is_shown_to_be_worse_is_not_called_undecided(
    low: float | None, high: float | None, said: str, script: ModuleType
) -> None:
    mean = 0.0 if low is None or high is None else (low + high) / 2
    assert script.said_of(Estimate(patients=9, mean=mean, low=low, high=high)) == said


def test_rounds_and_megabytes_are_those_of_the_first_evaluation_that_comes_to_99_percent(
    script: ModuleType,
) -> None:
    def stage(round_: int, stage: Any, dice: float | None = None) -> StageRecord:
        scores = {} if dice is None else {"dice": {"x": dice}}
        answer = SiteAnswer(site="a", patients=3, bytes_up=1_000_000, scores=scores)
        return StageRecord(
            round=round_, stage=stage, attempt=1, bytes_down=2_000_000, bytes_up=1_000_000,
            answers=(answer,), failures=(),
        )  # fmt: skip

    curve = {2: 0.5, 4: 0.795, 6: 0.85, 8: 0.8}
    history = [stage(0, "enlist")]
    for round_ in range(1, 9):
        history.append(stage(round_, "train"))
        if round_ in curve:
            history.append(stage(round_, "evaluate", curve[round_]))
    found = script.reached(history)
    assert (found["rounds"], found["mb"]) == (4, 12.0)
    assert [r for r, _, _ in found["curve"]] == list(curve)
