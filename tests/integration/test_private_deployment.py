"""A private study between real processes, its coordinator killed in the middle of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedseg.commands.federation import write_plan_file
from fedseg.imaging.phantoms import write_phantoms
from fedseg.plan import parse_plan
from fedseg.planfile import example
from fedseg.simulation.deployment import Deployment
from fedseg.simulation.hospitals import divide

ROUNDS = 2
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def plan_in(path: Path) -> None:
    value = parse_plan(example("phantoms").encode()).model_dump(mode="json", exclude={"initial"})
    value["study"] = "private"
    value["training"]["schedule"]["warmup_rounds"] = 0
    value["training"] |= {"gradient_clip_norm": None, "steps_per_round": 2}
    del value["training"]["batch_size"]
    value["aggregation"] |= {
        "rounds": ROUNDS, "minimum_sites": 2, "round_timeout_s": 300, "weighting": "uniform",
    }  # fmt: skip
    value["evaluation"] |= {"every_rounds": ROUNDS, "metrics": ["dice"]}
    value["privacy"] = {
        "guarantee": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "rate": 0.5,
        "expected_patients": 4, "expected_validation": 1, "patches_per_patient": 1,
        "release_after_s": 5.0, "outputs": {"metrics": "noised"},
    }  # fmt: skip
    write_plan_file(path, value)


def says(deployment: Deployment, name: str, *words: str) -> str:
    command = [str(Path(sys.executable).with_name("fedseg-site")), *words]
    place = ["--site", str(deployment.site(name).path)]
    done = subprocess.run([*command, *place], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_enrolment_to_the_model_every_message_is_paid_for_once(tmp_path: Path) -> None:
    plan_in(tmp_path / "study.yaml")
    write_phantoms(tmp_path / "data", sites=2, patients_per_site=6)
    data = divide(tmp_path / "data", tmp_path / "data-of")
    deployment = Deployment(tmp_path, tmp_path / "study.yaml", data)
    deployment.set_up()
    try:
        deployment.start_all()
        deployment.wait(lambda p: len(p.stages) >= 2, 300, lambda _: None)
        deployment.kill("coordinator")
        deployment.start("coordinator")
        deployment.wait(lambda p: p.finished, 500, lambda _: None)
    finally:
        deployment.stop_all()
    for name in data:
        (study,) = json.loads(says(deployment, name, "ledger", "show", "--json"))["studies"]
        for use in ("train", "val"):
            assert study[use]["steps_done"] == study[use]["steps_planned"] > 0
        assert study["unanswered"] == 0
        lines = says(deployment, name, "egress", "list", "--json").splitlines()
        left = [json.loads(line) for line in lines]
        paid = [(each["round"], each["stage"]) for each in left if each["paid"]]
        assert paid == [(1, "train"), (2, "train"), (2, "evaluate")]
        assert all(each["repeated"] for each in left if "epsilon" in each and not each["paid"])
        assert left[-1]["type"] == "release"
        says(deployment, name, "ledger", "verify")
        says(deployment, name, "audit", "verify")
        assert deployment.site(name).model("private").exists()
