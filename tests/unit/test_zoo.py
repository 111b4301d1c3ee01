"""Networks by name, their start and their arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from fedseg.arrays import digest_of
from fedseg.errors import PlanError, TrustError
from fedseg.models.zoo import (
    build_network,
    initial_model,
    load_tensors,
    refuse_running_statistics,
    state_tensors,
)
from fedseg.network import Model
from fedseg.plan import StudyPlan


def plan_of(dimensions: int = 3, seed: int = 0, **model: Any) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "study": "tiny",
            "task": {
                "dimensions": dimensions,
                "channels": [{"name": "T1", "modality": "MR"}],
                "labels": {"anterior": 1, "posterior": 2},
                "spacing_mm": [1.0] * dimensions,
                "patch_size": [8] * dimensions,
            },
            "model": model or {"options": {"channels": [4, 8]}},
            "training": {"seed": seed},
        }
    )


def options(**values: Any) -> dict[str, Any]:
    return {"options": {"channels": [4, 8, 16], "groups": 4} | values}


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "group"])
@pytest.mark.parametrize("residual_units", [0, 2])
def test_every_norm_has_affine_parameters_and_no_running_statistics(
    dimensions: int, norm: str, residual_units: int
) -> None:
    plan = plan_of(dimensions, **options(norm=norm, residual_units=residual_units))
    network = build_network(plan.model, plan.task)
    norms = [m for m in network.modules() if "Norm" in type(m).__name__]
    assert norms
    assert all(m.weight is not None and not list(m.buffers()) for m in norms)
    assert {type(m).__name__[:5] for m in norms} == {norm.capitalize()[:5]}
    assert network(torch.zeros(2, 1, *plan.task.patch_size)).shape == (2, 3, *plan.task.patch_size)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_opacus_finds_the_gradient_of_every_sample(dimensions: int, norm: str) -> None:
    plan = plan_of(dimensions, **options(norm=norm))
    torch.manual_seed(0)
    network = build_network(plan.model, plan.task)
    batch = torch.randn(2, 1, *plan.task.patch_size)
    network(batch[1:]).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    sampler = GradSampleModule(network, loss_reduction="sum")
    sampler(batch).square().flatten(1).mean(1).sum().backward()
    for name, parameter in sampler.named_parameters():
        mine = parameter.grad_sample[1]
        torch.testing.assert_close(
            mine, expected[name.removeprefix("_module.")], atol=1e-5, rtol=1e-3
        )


def test_the_initial_model_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    record, arrays = initial_model(plan_of())
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert initial_model(plan_of())[0] == record
    assert initial_model(plan_of(seed=1))[0].digest != record.digest
    assert digest_of(arrays) == record.digest
    assert record.nbytes == sum(a.nbytes for a in arrays.values())


def test_arrays_go_out_and_in_unchanged() -> None:
    plan = plan_of()
    _, arrays = initial_model(plan)
    network = build_network(plan.model, plan.task)
    load_tensors(network, arrays)
    assert digest_of(state_tensors(network)) == digest_of(arrays)
    state_tensors(network).popitem()[1][...] = 7.0
    assert digest_of(state_tensors(network)) == digest_of(arrays)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "dtype"])
def test_arrays_that_do_not_fit_are_refused_by_name(damage: str) -> None:
    plan = plan_of()
    _, arrays = initial_model(plan)
    name = sorted(arrays)[0]
    if damage == "missing":
        del arrays[name]
    elif damage == "extra":
        name = "a.backdoor"
        arrays[name] = np.zeros(3, np.float32)
    elif damage == "shape":
        arrays[name] = arrays[name][None]
    else:
        arrays[name] = arrays[name].astype(np.float64)
    network = build_network(plan.model, plan.task)
    before = digest_of(state_tensors(network))
    with pytest.raises(TrustError, match=name):
        load_tensors(network, arrays)
    assert digest_of(state_tensors(network)) == before


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm3d(2),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.InstanceNorm2d(2, track_running_stats=True),
    ],
)
def test_layers_that_mix_patients_are_refused_with_reason_and_remedy(layer: nn.Module) -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(layer))
    with pytest.raises(PlanError, match=r"'1\.0' is a .*(mixes|running).*use an instance or group"):
        refuse_running_statistics(network)


TOY = """
import torch
from torch import nn


class Factory:
    version = "3"

    def build(self, task, options):
        convolution = nn.Conv3d if task.dimensions == 3 else nn.Conv2d
        layers = [convolution(len(task.channels), options["classes"], 1)]
        if options.get("batch_norm"):
            layers.append(nn.BatchNorm3d(options["classes"]))
        if options.get("counter"):
            layers[0].register_buffer("calls", torch.zeros((), dtype=torch.int64))
        return nn.Sequential(*layers)


factory = Factory()
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_networks.py").write_text(TOY)
    info = tmp_path / "toy_networks-3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-networks\nVersion: 3\n")
    (info / "entry_points.txt").write_text("[fedseg.networks]\ntoy = toy_networks:factory\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("toy")
def test_an_installed_network_is_built_by_its_entry_point() -> None:
    plan = plan_of(network="toy", version="3", options={"classes": 3})
    assert {s.name for s in initial_model(plan)[0].tensors} == {"0.bias", "0.weight"}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"version": "4", "options": {"classes": 3}}, "asks for toy 4, but 3 is installed"),
        ({"version": "3", "options": {"classes": 5}}, r"shape \[1, 5, 8, 8, 8\], expected \[1, 3"),
        ({"version": "3", "options": {}}, "cannot be built: KeyError"),
        ({"version": "3", "options": {"classes": 3, "batch_norm": True}}, "BatchNorm3d"),
        ({"version": "3", "options": {"classes": 3, "counter": True}}, "'0.calls' is torch.int64"),
        ({"version": "3", "network": "tay", "options": {}}, "installed: toy, unet"),
    ],
)
def test_an_installed_network_that_does_not_fit_is_a_plan_error(
    model: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        initial_model(plan_of(**({"network": "toy"} | model)))


def test_a_model_by_name_only_is_built_in() -> None:
    assert Model().network == "unet"
