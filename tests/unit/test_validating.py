"""A validation from measured patients: summaries, subgroups, warnings, the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from small_validations import EMPTY, patient, patients

from fedseg.evaluation.calibration import reliability
from fedseg.evaluation.observations import Detection
from fedseg.evaluation.subgroups import subgroups, value_of
from fedseg.evaluation.summaries import summarise
from fedseg.evaluation.thresholds import Thresholds
from fedseg.evaluation.validating import Setting, validated
from fedseg.evaluation.validation import Candidate, ValidationResult

BASE = np.linspace(0.80, 0.92, 12).tolist()
VOXELS = reliability(np.array([0.95, 0.65]), np.array([True, False]), np.ones(2, bool))


def candidate(name: str, **changes: Any) -> Candidate:
    fields = {
        "name": name,
        "file": f"{name}.safetensors",
        "model_digest": "a" * 64,
        "plan_digest": "b" * 64,
        "study": "tiny",
        "arm": "federated",
        "rounds": 3,
        "trained_on": "every hospital's patients",
    }
    return Candidate.model_validate(fields | changes)


def setting(**changes: Any) -> Setting:
    fields: dict[str, Any] = {
        "site": "hospital_a",
        "created": "2026-05-03T12:00:00+00:00",
        "split": "test",
        "tolerance_mm": 1.0,
        "labels": {"head": 1},
        "suppress_below": 5,
    }
    return Setting(**(fields | changes))


def found(rows: dict[str, list[Any]], **changes: Any) -> ValidationResult:
    voxels = {name: [VOXELS] * len(own) for name, own in rows.items()}
    return validated([candidate(name) for name in rows], rows, voxels, setting(**changes))


def test_a_validation_comes_back_from_its_file_as_it_was() -> None:
    rows = {"global": patients("global", BASE), "local": patients("local", BASE)}
    result = found(rows, thresholds=Thresholds(dice_at_least=0.5))
    assert ValidationResult.model_validate_json(result.model_dump_json()) == result
    assert result.verdict.decision == "go" and result.margin == 0.005
    assert [p.patient for p in result.patients_of("local")][:2] == ["P0", "P1"]
    assert result.summary("global").worst_patient == "P0"
    assert len(result.comparisons) == 4 and len(result.agreement) == 2
    assert result.calibration[0].error.mean == pytest.approx((0.05 + 0.65) / 2)


def test_a_summary_by_hand() -> None:
    lesions = Detection(lesions=4, found=3, predicted=5, right=3)
    none = Detection(lesions=0, found=0, predicted=1, right=0)
    own = [
        patient("B", 0.6, failures=(EMPTY,), label={"lesions": lesions.model_dump()}, seconds=2.0),
        patient("A", 0.6, label={"lesions": none.model_dump()}, seconds=1.0),
        patient("C", None, seconds=9.0),
    ]
    summary = summarise("global", own)
    assert (summary.patients, summary.dice.patients) == (3, 2)
    assert (summary.worst_patient, summary.worst_dice) == ("A", 0.6)
    assert summary.failed == 1 and summary.failures == {"empty": 1} and summary.seconds == 2.0
    head = summary.labels["head"]
    assert head.lesions == Detection(lesions=4, found=3, predicted=6, right=3)
    assert head.sensitivity is not None and head.sensitivity.mean == 0.75
    assert head.precision is not None and head.precision.mean == pytest.approx((0.6 + 0) / 2)
    assert head.false_lesions is not None and head.false_lesions.mean == 1.5
    assert head.volume_error_ml.mean == pytest.approx(1.0)


def test_ten_patients_whose_lesions_are_all_found_do_not_make_it_certain() -> None:
    """A bootstrap of ten equal shares would run from 1 to 1."""
    all_found = Detection(lesions=2, found=2, predicted=2, right=2)
    one_missed = Detection(lesions=2, found=1, predicted=2, right=2)
    own = [patient(f"P{i}", 0.8, label={"lesions": all_found.model_dump()}) for i in range(10)]
    found = summarise("global", own).labels["head"].sensitivity
    assert found is not None and (found.mean, found.low, found.high) == (1.0, None, None)
    own[0] = patient("P0", 0.8, label={"lesions": one_missed.model_dump()})
    found = summarise("global", own).labels["head"].sensitivity
    assert found is not None and found.low is not None and found.low < 0.95


def test_warnings_say_what_the_numbers_cannot() -> None:
    few = found({"global": patients("global", BASE[:4])}, split="val")
    assert any("only 4 patients: too few" in words for words in few.warnings)
    assert any("those of `val` were measured" in words for words in few.warnings)
    wild = [dice + (0.05 if i % 2 else -0.05) for i, dice in enumerate(BASE)]
    rows = {"global": patients("global", BASE), "local": patients("local", wild)}
    more = found(rows, left_out={"case without a label": 2}, labels={"head": 1, "body": 2})
    said = "\n".join(more.warnings)
    assert "global against local is undecided: with 12 patients" in said
    assert "no prediction of global failed, which still allows for failures in up to 26%" in said
    assert "2 case without a label" in said and "nothing is known of body" in said
    assert more.labels == {"head": 1} and "`val`" not in said
    tuned = validated(
        [candidate("finetuned", arm="finetuned")],
        {"finetuned": patients("finetuned", BASE)},
        {"finetuned": [VOXELS] * 12},
        setting(split="val"),
    )
    assert any("these patients chose the model" in words for words in tuned.warnings)


def test_small_subgroups_are_named_and_nothing_is_said_of_them() -> None:
    traits = {"scanner": {f"P{i}": ["A"] if i < 8 else ["B"] for i in range(11)}}
    groups = subgroups(traits, {"global": patients("global", BASE)}, 5)
    assert [(g.value, g.patients, g.suppressed) for g in groups] == [
        ("A", 8, False),
        ("B", None, True),
        ("unknown", None, True),
    ]
    assert groups[0].dice["global"].mean == pytest.approx(np.mean(BASE[:8]))
    assert groups[1].dice == {} and groups[1].failed == {}
    assert len(subgroups(traits, {"global": patients("global", BASE)}, 3)) == 3


@pytest.mark.parametrize(
    ("column", "said", "value"),
    [
        ("age", ["17"], "under 18"),
        ("age", ["18"], "18 to 39"),
        ("age", ["074Y"], "60 to 74"),
        ("age", ["75.5"], "75 and over"),
        ("age", ["old"], "unknown"),
        ("age", ["30", "31"], "18 to 39"),
        ("sex", ["F"], "female"),
        ("sex", ["male", ""], "male"),
        ("sex", ["divers"], "divers"),
        ("scanner", ["A", "B"], "several"),
        ("scanner", [], "unknown"),
    ],
)
def test_cells_become_groups(column: str, said: list[str], value: str) -> None:
    assert value_of(column, said) == value


def test_ages_go_by_age() -> None:
    traits = {"age": {f"P{i}": [str(80 - 7 * i)] for i in range(12)}}
    groups = subgroups(traits, {"global": patients("global", BASE)}, 1)
    assert [g.value for g in groups] == [
        "under 18",
        "18 to 39",
        "40 to 59",
        "60 to 74",
        "75 and over",
    ]


def test_a_result_names_only_its_candidates() -> None:
    result = found({"global": patients("global", BASE)})
    with pytest.raises(ValidationError, match="candidates"):
        ValidationResult.model_validate(result.model_dump() | {"candidates": [candidate("own")]})
