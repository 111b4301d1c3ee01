"""Freezing a part of a network: what is trained, and that nothing else moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedseg.errors import PlanError
from fedseg.imaging.transforms import PreparedCase
from fedseg.learning.local import train_round
from fedseg.learning.optimiser import (
    build_optimiser,
    optimiser_arrays,
    restore_optimiser,
    trained,
)
from fedseg.models.parts import divide, freeze
from fedseg.models.zoo import build_network, initial_model, load_tensors, state_tensors
from fedseg.plan import StudyPlan
from fedseg.training import Trainable

NARROW: tuple[Trainable, ...] = ("norms", "head", "norms+head")


def plan_of(units: int = 0, norm: str = "instance", **training: Any) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "study": "tiny",
            "task": {
                "dimensions": 3,
                "channels": [{"name": "T1", "modality": "MR"}],
                "labels": {"ball": 1},
                "spacing_mm": [1.0] * 3,
                "patch_size": [8] * 3,
            },
            "model": {
                "options": {
                    "channels": [4, 8],
                    "residual_units": units,
                    "norm": norm,
                    "groups": 4,
                    "dropout": 0.1,
                }
            },
            "training": {"steps_per_round": 2} | training,
            "aggregation": {"rounds": 5},
        }
    )


def network_of(plan: StudyPlan) -> nn.Module:
    return build_network(plan.model, plan.task)


def case_of(seed: int) -> PreparedCase:
    label = np.zeros((10, 9, 8), np.uint8)
    label[3:7, 2:6, 2:6] = 1
    image = label[None] + 0.3 * np.random.default_rng(seed).standard_normal((1, *label.shape))
    return PreparedCase(image.astype(np.float32), label, np.eye(4), (1.0, 1.0, 1.0))


PATIENTS = {f"p{i}": [case_of(i)] for i in range(3)}


@pytest.mark.parametrize("norm", ["instance", "group"])
@pytest.mark.parametrize("units", [0, 2])
def test_norms_are_the_affines_and_nothing_else(norm: str, units: int) -> None:
    network = network_of(plan_of(units, norm))
    names = freeze(network, "norms")
    assert names == tuple(n for n, _ in network.named_parameters() if ".adn.N." in n)
    assert all(p.ndim == 1 for p in trained(network).values())
    assert tuple(trained(network)) == names


@pytest.mark.parametrize(("units", "head"), [(0, "model.2.conv"), (2, "model.2.1.conv.unit0.conv")])
def test_the_head_is_the_last_convolution(units: int, head: str) -> None:
    network = network_of(plan_of(units))
    assert freeze(network, "head") == (f"{head}.weight", f"{head}.bias")


def test_both_together_and_all() -> None:
    names = freeze(network_of(plan_of()), "norms+head")
    alone = freeze(network_of(plan_of()), "norms") + freeze(network_of(plan_of()), "head")
    assert set(names) == set(alone) and len(names) == len(alone)
    network = network_of(plan_of())
    assert freeze(network, "all") == tuple(name for name, _ in network.named_parameters())


def test_what_the_network_froze_itself_stays_frozen() -> None:
    network = network_of(plan_of())
    own = "model.0.adn.N.weight"
    network.get_parameter(own).requires_grad_(False)
    assert own not in freeze(network, "norms")
    assert own not in freeze(network, "all")


def test_a_network_without_the_part_is_refused_and_left_alone() -> None:
    bare = nn.Sequential(nn.Conv3d(1, 2, 3), nn.PReLU(), nn.InstanceNorm3d(2), nn.Conv3d(2, 2, 1))
    for trainable in ("norms", "norms+head"):
        with pytest.raises(PlanError, match="no norm with affine"):
            freeze(bare, trainable)
    assert all(p.requires_grad for p in bare.parameters())
    with pytest.raises(PlanError, match="no convolution or linear"):
        freeze(nn.Sequential(nn.GroupNorm(1, 2)), "head")
    frozen = nn.Sequential(nn.Conv3d(1, 2, 3)).requires_grad_(False)
    with pytest.raises(PlanError, match="the network itself froze it"):
        freeze(frozen, "all")


class Shared(nn.Module):
    """Two convolutions of one weight, and two norms of one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(2, 2, 1, bias=False), nn.Conv3d(2, 2, 1, bias=False)
        self.early, self.late = nn.GroupNorm(1, 2), nn.GroupNorm(1, 2)
        self.last.weight, self.late.weight = self.first.weight, self.early.weight


@pytest.mark.parametrize(
    ("strategy", "trainable", "personal", "frozen"),
    [
        ("fedbn", "all", "early.bias early.weight late.bias late.weight", ""),
        ("fedper", "all", "first.weight last.weight", ""),
        ("fedavg", "norms", "", "first.weight last.weight"),
        ("fedavg", "head", "", "early.bias early.weight late.bias late.weight"),
    ],
)
def test_a_parameter_that_layers_share_stays_at_home_under_each_of_its_names(
    strategy: str, trainable: Trainable, personal: str, frozen: str
) -> None:
    plan = plan_of()
    aggregation = plan.aggregation.model_copy(update={"strategy": strategy})
    network = Shared()
    freeze(network, trainable)
    found = divide(network, plan.model_copy(update={"aggregation": aggregation}))
    assert found == (tuple(personal.split()), tuple(frozen.split()))
    travels = network.state_dict().keys() - {*found[0], *found[1]}
    kept = {network.get_parameter(name).data_ptr() for name in (*found[0], *found[1])}
    assert travels and kept.isdisjoint(network.get_parameter(n).data_ptr() for n in travels)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("trainable", NARROW)
def test_a_round_moves_the_part_and_leaves_every_other_bit(name: str, trainable: Trainable) -> None:
    plan = plan_of(
        optimiser={"name": name, "learning_rate": 0.1, "weight_decay": 0.1}, trainable=trainable
    )
    _, start = initial_model(plan)
    network = network_of(plan)
    load_tensors(network, start)
    names = freeze(network, trainable)
    outcome = train_round(network, PATIENTS, plan, round_=1, site="A")
    after = state_tensors(network)
    moved = {key for key in start if not np.array_equal(start[key], after[key])}
    assert moved <= set(names) and moved
    assert all(np.all(np.subtract(after[key], start[key]) == 0) for key in start.keys() - moved)
    assert {key.partition("/")[2] for key in outcome.optimiser_state} == set(names)
    again = train_round(
        network, PATIENTS, plan, round_=2, site="A", optimiser_state=outcome.optimiser_state
    )
    assert set(again.optimiser_state) == set(outcome.optimiser_state)
    load_tensors(network, start)
    assert tuple(trained(network)) == names


def test_fedprox_pulls_the_trained_part_alone() -> None:
    plan = plan_of(trainable="norms")
    strategy = {"strategy": "fedprox", "proximal_mu": 1.0}
    plan = plan.model_copy(update={"aggregation": plan.aggregation.model_copy(update=strategy)})
    _, start = initial_model(plan)
    network = network_of(plan)
    load_tensors(network, start)
    names = freeze(network, "norms")
    elsewhere = {key: array + 1 for key, array in start.items()}
    train_round(network, PATIENTS, plan, round_=1, site="A", anchor=elsewhere)
    after = state_tensors(network)
    assert {k for k in start if not np.array_equal(start[k], after[k])} <= set(names)


def test_an_optimiser_of_a_part_is_stored_and_restored() -> None:
    plan = plan_of()
    first, second = network_of(plan), network_of(plan)
    for network in (first, second):
        load_tensors(network, initial_model(plan)[1])
        freeze(network, "norms+head")
    one = build_optimiser(first, plan.training.optimiser)
    torch.manual_seed(0)
    first(torch.randn(1, 1, 8, 8, 8)).square().sum().backward()
    one.step()
    stored = optimiser_arrays(first, one)
    other = build_optimiser(second, plan.training.optimiser)
    restore_optimiser(second, other, stored)
    found = optimiser_arrays(second, other)
    assert found.keys() == stored.keys()
    assert all(np.array_equal(found[key], stored[key]) for key in stored)
