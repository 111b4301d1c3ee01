"""result.json: the published schema, and equal bytes for equal studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError
from study_results import make_result

from fedseg.errors import DataError
from fedseg.measures import Metric
from fedseg.reports.schema import result_schema
from fedseg.result import PatientScores, StudyResult, load_result, mean_of

SCHEMA = Path(__file__).parents[2] / "docs" / "result.schema.json"


def test_the_published_schema_is_the_models_own() -> None:
    assert json.loads(SCHEMA.read_text()) == StudyResult.model_json_schema()
    assert SCHEMA.read_text() == result_schema()


def test_equal_studies_give_equal_bytes() -> None:
    assert make_result().to_json() == make_result().to_json()


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = make_result()
    path = tmp_path / "result.json"
    path.write_text(result.to_json())
    assert load_result(path) == result
    assert load_result(path).to_json() == result.to_json()


def test_only_the_block_run_depends_on_the_machine() -> None:
    result = make_result()
    run = result.run.model_copy(update={"wall_s": 1.0, "engine": "ray"})
    one, two = (json.loads(r.to_json()) for r in (result, result.model_copy(update={"run": run})))
    assert one.pop("run") != two.pop("run")
    assert one == two


def test_a_key_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    value = json.loads(make_result().to_json()) | {"surprise": 1}
    with pytest.raises(ValidationError):
        StudyResult.model_validate(value)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="not a fedseg result"):
        load_result(path)


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        load_result(tmp_path / "none.json")


def test_a_patient_gives_its_values_by_the_plans_names_of_metrics() -> None:
    patient = PatientScores(
        site="a", patient="p", cases=1, dice={"x": 0.5}, hd95_mm={"x": 3.0}, nsd={"x": None}
    )
    assert [patient.of(metric) for metric in get_args(Metric)] == [
        {"x": 0.5},
        {"x": 3.0},
        {"x": None},
    ]


def test_the_mean_skips_labels_without_a_value() -> None:
    assert mean_of({"a": 0.5, "b": None, "c": 1.0}) == pytest.approx(0.75)
    assert mean_of({"a": None}) is None
