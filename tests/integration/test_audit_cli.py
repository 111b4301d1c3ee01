"""`fedseg audit privacy` as a user meets it: on a plan file, with and without patients."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_studies import tiny_plan, tiny_private_plan, write_plan

from fedseg.cli import main
from fedseg.imaging.phantoms import write_phantoms
from fedseg.planfile import build


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private plan that was built; small enough to train eight models."""
    path = tmp_path_factory.mktemp("plan") / "study.json"
    promise = {"epsilon": 1.0, "delta": 1e-5, "rate": 1.0}
    write_plan(path, tiny_private_plan(privacy=promise, training={"steps_per_round": 1}))
    build(path)
    return path


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command; its status and what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def ran(*arguments: object) -> tuple[int, str, str]:
        words = ["fedseg", "audit", "privacy", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return ran


def test_an_honest_plan_is_not_refuted(audit: Any, plan: Path) -> None:
    status, out, _ = audit("--plan", plan, "--canaries", 500, "--seed", 1)
    assert status == 0
    for said in (
        "claimed, at delta 1e-05",
        "at least (95% confidence)",
        "noised metrics",
        "no proof",
    ):
        assert said in out
    status, out, _ = audit("--plan", plan, "--canaries", 500, "--seed", 1, "--json")
    found = json.loads(out)
    assert (status, found["verdict"], found["membership"]) == (0, "not refuted", None)
    assert found["claimed"] == 1.0
    assert 0 <= found["bound"]["epsilon"] <= 1.0 < found["bound"]["ceiling"]
    assert found["bound"]["confidence"] == 0.95
    assert [check["holds"] for check in found["checks"]] == [True] * 5
    assert found["metrics"]["bound"]["epsilon"] <= 1.0 < found["metrics"]["bound"]["ceiling"]


def test_patients_are_attacked_where_a_data_folder_is_given(
    audit: Any, plan: Path, tmp_path: Path
) -> None:
    data = write_phantoms(
        tmp_path / "data", sites=2, patients_per_site=6, shape=(20, 22, 20), seed=3
    )
    status, out, err = audit("--plan", plan, "--canaries", 50, "--data", data, "--json")
    found = json.loads(out)
    assert status == 0
    rows = csv.DictReader((data / "sites.csv").read_text().splitlines())
    trained = {row["patient"] for row in rows if row["split"] == "train"}
    assert found["membership"]["patients"] == len(trained)
    assert found["membership"]["models"] == 8
    mean, low, high = found["membership"]["difference"]
    assert low <= mean <= high
    assert "phantom_a01" not in out + err


def test_a_plan_whose_noise_was_lowered_by_hand_is_refuted(
    audit: Any, plan: Path, tmp_path: Path
) -> None:
    value = yaml.safe_load(plan.read_text())
    value["calibrated"]["training"] /= 4
    weak = tmp_path / "weak.json"
    weak.write_text(json.dumps(value))
    status, out, _ = audit("--plan", weak, "--canaries", 2000)
    assert status == 1
    assert "REFUTED: canaries show an epsilon of at least" in out
    assert "build the plan again" in out


def test_what_cannot_be_audited_is_refused(audit: Any, plan: Path, tmp_path: Path) -> None:
    status, _, err = audit("--plan", write_plan(tmp_path / "open.json", tiny_plan()))
    assert status == 1
    assert "nothing to audit" in err
    status, _, err = audit("--plan", write_plan(tmp_path / "new.json", tiny_private_plan()))
    assert status == 1
    assert "fedseg plan build" in err
    status, _, err = audit("--plan", plan, "--canaries", 5, "--data", tmp_path, "--models", 6)
    assert status == 1
    assert "multiple of 4" in err
