"""`fedseg pretrain`, and a plan that starts from what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_plans import values
from typer.testing import CliRunner

from fedseg import planfile
from fedseg.arrays import digest_of
from fedseg.cli import app
from fedseg.errors import DataError, FedsegError, PlanError
from fedseg.imaging.phantoms import write_phantoms
from fedseg.initial import load_initial
from fedseg.learning import pretraining
from fedseg.learning.pretraining import phantom_patients, pretrain, pretraining_plan
from fedseg.modelfile import load_model, save_model
from fedseg.plan import StudyPlan, load_plan


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "CHUNK", 2)


def write_plan(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(values(**changes)), encoding="utf-8")
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, FedsegError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_study_starts_from_what_was_pretrained(tmp_path: Path) -> None:
    plan, out = write_plan(tmp_path / "study.yaml"), tmp_path / "start.safetensors"
    said = run("pretrain", plan, "--out", out, "--steps", 4, "--phantoms", 3)
    assert "mean Dice of 24 held-back" in said and not list(tmp_path.glob("*.unfinished"))
    header, model = load_model(out)
    assert header.arm == "pretrained" and header.rounds == 2
    run("plan", "build", plan, "--from", out)
    built = load_plan(plan)
    assert built.built.digest == digest_of(model) == header.model_digest
    begun = load_initial(plan)
    assert begun is not None and digest_of(begun) == built.built.digest
    run("plan", "build", plan)
    assert load_plan(plan).built.digest != built.built.digest
    with pytest.raises(DataError, match="is there already"):
        run("pretrain", plan, "--out", out)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__options": {"channels": [4, 16]}}, "model"),
        ({"task__labels": {"posterior": 1, "anterior": 2}}, "task.labels"),
        ({"task__spacing_mm": [1.0, 1.0, 1.0]}, "task.spacing_mm"),
        ({"task__channels": [{"name": "T2w", "modality": "MR"}]}, "task.channels"),
    ],
)
def test_a_model_of_another_network_or_task_is_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    other = write_plan(tmp_path / "other.yaml", **changes)
    planfile.build(other)
    plan = write_plan(tmp_path / "study.yaml")
    before = plan.read_bytes()
    with pytest.raises(PlanError, match=f"its {named} is"):
        planfile.build(plan, planfile.initial_path(other))
    assert plan.read_bytes() == before and not planfile.initial_path(plan).exists()


def test_another_patch_is_no_other_task_but_nan_is_no_start(tmp_path: Path) -> None:
    other = write_plan(tmp_path / "other.yaml", task__patch_size=[16, 8, 8])
    made = planfile.build(other)
    plan = write_plan(tmp_path / "study.yaml", training__seed=9)
    assert planfile.build(plan, planfile.initial_path(other)).built.digest == made.built.digest
    _, model = load_model(planfile.initial_path(other))
    broken = {name: np.full_like(array, np.nan) for name, array in model.items()}
    save_model(tmp_path / "nan.safetensors", made, broken, arm="pretrained", rounds=1)
    with pytest.raises(PlanError, match="NaN"):
        planfile.build(plan, tmp_path / "nan.safetensors")


def test_stopped_pretraining_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    plan = StudyPlan.model_validate(values())
    own = pretraining_plan(plan, steps=6, seed=3)
    patients = phantom_patients(own.task, 3, range(3))
    *_, whole = pretrain(own, patients)
    states = pretrain(own, phantom_patients(own.task, 3, range(3)))
    first = next(states)
    *_, resumed = pretrain(own, patients, start=first)
    assert whole.chunks == resumed.chunks == 3
    assert digest_of(whole.model) == digest_of(resumed.model)


def test_a_stop_is_kept_and_another_recipe_does_not_go_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = write_plan(tmp_path / "study.yaml"), tmp_path / "start.safetensors"
    recipe = ("pretrain", plan, "--out", out, "--steps", 12, "--phantoms", 3)
    whole = tmp_path / "whole.safetensors"
    run(*recipe[:3], whole, *recipe[4:])
    real, done = pretraining.train_round, []

    def stopping(*args: Any, **more: Any) -> Any:
        if len(done) == 5:
            raise DataError("pulled the plug")
        done.append(1)
        return real(*args, **more)

    monkeypatch.setattr(pretraining, "train_round", stopping)
    with pytest.raises(DataError, match="plug"):
        run(*recipe)
    assert (tmp_path / "start.safetensors.unfinished").exists() and not out.exists()
    with pytest.raises(DataError, match="another pre-training"):
        run(*recipe, "--seed", 7)
    monkeypatch.setattr(pretraining, "train_round", real)
    run(*recipe)
    assert load_model(out)[0].model_digest == load_model(whole)[0].model_digest


def test_a_private_plan_is_pretrained_without_its_guarantee() -> None:
    private = {
        "guarantee": "local",
        "epsilon": 8.0,
        "delta": 1e-3,
        "clip_norm": 1.0,
        "expected_patients": 5,
    }
    plan = StudyPlan.model_validate(
        values(
            privacy=private,
            aggregation__weighting="uniform",
            training={"gradient_clip_norm": None, "trainable": "norms"},
        )
    )
    own = pretraining_plan(plan, steps=100, seed=2)
    assert own.private is None and own.training.trainable == "all"
    assert own.task == plan.task and own.model == plan.model
    assert own.training.augmentation == plan.training.augmentation


def test_a_public_cohort_is_pretrained_on(tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "data", sites=1, patients_per_site=4, shape=(16, 16, 16))
    changes = {"head": 1, "body": 2}
    plan = write_plan(tmp_path / "study.yaml", task__labels=changes)
    out = tmp_path / "start.safetensors"
    said = run("pretrain", plan, "--out", out, "--data", data, "--steps", 2)
    assert "mean Dice of 2 held-back" in said
    assert run("plan", "build", plan, "--from", out)
