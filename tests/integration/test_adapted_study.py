"""Adapters from a pre-trained start to a plain model: plan, private study, prediction, folding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_studies import tiny_plan, tiny_private_plan
from typer.testing import CliRunner

from fedseg.arrays import digest_of
from fedseg.cli import app
from fedseg.errors import PlanError
from fedseg.learning.pretraining import pretraining_plan
from fedseg.modelfile import load_model, save_model
from fedseg.models.adapters import Adapted
from fedseg.models.zoo import build_network, initial_model, load_tensors
from fedseg.plan import StudyPlan, load_plan
from fedseg.planfile import build, initial_path, load_initial
from fedseg.simulation import Options, simulate

SMALL: dict[str, Any] = {"options": {"channels": [8, 16], "residual_units": 0}}


def adapted_plan(rank: int = 2, trainable: str = "adapters", **adapters: Any) -> StudyPlan:
    return tiny_private_plan(
        model=SMALL | {"adapters": {"rank": rank} | adapters},
        training={"trainable": trainable, "gradient_clip_norm": None},
    )


def written(path: Path, plan: StudyPlan) -> Path:
    """A plan file, as exact as the plan itself."""
    path.write_bytes(plan.canonical_bytes)
    return path


def outputs(plan: StudyPlan, tensors: dict[str, Any]) -> torch.Tensor:
    network = build_network(plan.model, plan.task)
    load_tensors(network, tensors)
    x = torch.randn(2, 1, *plan.task.patch_size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = network.double()(x.double())
    return found


@dataclass(frozen=True)
class Study:
    """A pre-trained model, the plan that was built from it, and what the study wrote."""

    start: Path
    plan_file: Path
    out: Path
    said: str


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model as `fedseg pretrain` would write it for the adapted plan."""
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    plan = pretraining_plan(adapted_plan(), steps=50, seed=3)
    assert plan.model.adapters is None
    save_model(path, plan, initial_model(plan)[1], arm="pretrained", rounds=1)
    return path


@pytest.fixture(scope="module")
def study(data: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A private study whose adapters alone are trained, from the command line's own plan."""
    folder = tmp_path_factory.mktemp("adapted")
    path = written(folder / "study.yaml", adapted_plan())
    told = CliRunner().invoke(app, ["plan", "build", str(path), "--from", str(pretrained)])
    assert told.exit_code == 0, told.output
    simulate(load_plan(path), data, folder / "out", Options(initial=load_initial(path)))
    return Study(pretrained, path, folder / "out", told.output)


def test_a_plan_starts_from_the_plain_model_with_fresh_adapters(study: Study) -> None:
    plan, tensors = load_plan(study.plan_file), load_initial(study.plan_file)
    assert tensors is not None and plan.built.digest == digest_of(tensors)
    header, plain = load_model(study.start)
    assert torch.equal(outputs(plan, dict(tensors)), outputs(header.plan, plain))
    ups = [a for name, a in tensors.items() if name.endswith(".up.weight")]
    downs = [a for name, a in tensors.items() if name.endswith(".down.weight")]
    assert ups and not any(a.any() for a in ups) and all(a.any() for a in downs)
    trained = sum(a.size for a in (*ups, *downs))
    assert f"{trained:,} of them trained" in study.said


def test_a_study_moves_the_adapters_alone(study: Study) -> None:
    start = load_initial(study.plan_file)
    _, after = load_model(study.out / "model.safetensors")
    assert start is not None and start.keys() == after.keys()
    moved = {name for name in start if not np.array_equal(start[name], after[name])}
    assert moved == {name for name in start if ".down." in name or ".up." in name}


def test_a_released_adapted_model_segments_and_is_measured(
    study: Study, data: Path, tmp_path: Path
) -> None:
    model, image = str(study.out / "model.safetensors"), next((data / "images").glob("*.nii.gz"))
    predicted = CliRunner().invoke(app, ["predict", model, str(image), "--out", str(tmp_path)])
    assert predicted.exit_code == 0 and len(list(tmp_path.iterdir())) == 1
    measured = CliRunner().invoke(app, ["evaluate", model, "--data", str(data), "--json"])
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.output)


def test_a_released_adapted_model_becomes_a_plain_one(study: Study, tmp_path: Path) -> None:
    released = study.out / "model.safetensors"
    plan = build(written(tmp_path / "plain.yaml", tiny_plan()), released)
    _, plain = load_model(initial_path(tmp_path / "plain.yaml"))
    assert plan.built.tensors == initial_model(tiny_plan())[0].tensors
    header, adapted = load_model(released)
    network = build_network(header.plan.model, header.plan.task)
    assert any(isinstance(layer, Adapted) for layer in network.modules())
    expected = outputs(header.plan, adapted)
    assert torch.allclose(outputs(plan, plain), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, outputs(plan, load_model(study.start)[1]), atol=1e-3)


def test_other_adapters_begin_where_the_released_ones_ended(study: Study, tmp_path: Path) -> None:
    released = study.out / "model.safetensors"
    wider = written(tmp_path / "wider.yaml", adapted_plan(rank=3, down="frozen"))
    plan = build(wider, released)
    tensors = load_initial(wider)
    header, before = load_model(released)
    assert tensors is not None
    assert not any(a.any() for name, a in tensors.items() if name.endswith(".up.weight"))
    expected = outputs(header.plan, before)
    assert torch.allclose(outputs(plan, dict(tensors)), expected, rtol=1e-4, atol=1e-5)
    same = written(tmp_path / "same.yaml", adapted_plan())
    assert build(same, released).built.digest == header.model_digest


def test_random_weights_are_not_adapted(data: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "study.yaml", adapted_plan())
    with pytest.raises(PlanError, match=r"needs a trained model to adapt.*--from MODEL"):
        build(path)
    assert not initial_path(path).exists()
    with pytest.raises(PlanError, match="needs a trained model to adapt"):
        simulate(adapted_plan(), data, tmp_path / "out")
