"""Every strategy against an implementation of its paper that shares no code with it.

The problem is convex and small: one linear layer, squared error, every patient one patch and all of
them in every step, so that a step is a full gradient. The references are plain numpy after the
papers' algorithms; the servers agree with Flower's too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAvgM, FedYogi
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray
from torch import Tensor, nn

from fedseg.aggregation.accumulate import MeanAccumulator
from fedseg.aggregation.server import Presence, ServerState, apply_update
from fedseg.arrays import digest_of, schema_of
from fedseg.imaging.transforms import PreparedCase
from fedseg.learning import local
from fedseg.learning.strategies import Memory, train_by_strategy, used_here
from fedseg.models.zoo import state_tensors
from fedseg.plan import StudyPlan
from fedseg.rates import summed_rate
from fedseg.schema import InitialModel
from fedseg.strategy import Aggregation

Weights = NDArray[np.float64]
SITES = ("A", "B", "C")
ROUNDS, STEPS, RATE = 5, 3, 0.05
SIDE = 4


class Linear(nn.Module):
    """Two channels to two logits a voxel, and a bias, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(2, 2, 1, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.3, -0.2], [0.1, 0.4]]).reshape(2, 2, 1, 1, 1))
            self.layer.bias.copy_(torch.tensor([0.05, -0.1]))

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.double())  # type: ignore[no-any-return]


def squared(logits: Tensor, labels: Tensor, *_: Any) -> Tensor:
    """Mean squared error to the one-hot labels, per patient."""
    wanted = torch.nn.functional.one_hot(labels.long(), 2).movedim(-1, 1).to(logits.dtype)
    return ((logits - wanted) ** 2).flatten(1).mean(1)


@pytest.fixture(autouse=True)
def _convex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(local, "dice_ce_per_patient", squared)
    yield


def patients_of(site: str) -> dict[str, list[PreparedCase]]:
    """Three patients, whose images differ by hospital in contrast and offset."""
    rng = np.random.default_rng(ord(site))
    found = {}
    for index in range(3):
        label = (rng.random((SIDE, SIDE, SIDE)) < 0.4).astype(np.uint8)
        image = rng.normal(size=(2, *label.shape)) * (ord(site) - 63) / 2 + label
        case = PreparedCase(image.astype(np.float32), label, np.eye(4), (1.0, 1.0, 1.0))
        found[f"{site}{index}"] = [case]
    return found


def plan_of(**aggregation: Any) -> StudyPlan:
    values = {
        "study": "convex",
        "task": {
            "dimensions": 3,
            "channels": [{"name": "a", "modality": "MR"}, {"name": "b", "modality": "MR"}],
            "labels": {"ball": 1},
            "spacing_mm": [1.0] * 3,
            "patch_size": [SIDE] * 3,
        },
        "model": {"options": {"channels": [4, 8]}},
        "training": {
            "optimiser": {
                "name": "sgd", "learning_rate": RATE, "momentum": 0.0, "weight_decay": 0.0,
                "state": "reset",
            },
            "schedule": {"name": "constant", "warmup_rounds": 0},
            "steps_per_round": STEPS,
            "batch_size": 3,
            "gradient_clip_norm": None,
            "mixed_precision": False,
        },
        "aggregation": {"rounds": ROUNDS, "weighting": "uniform"} | aggregation,
    }  # fmt: skip
    start = state_tensors(Linear())
    record = InitialModel(digest=digest_of(start), tensors=schema_of(start))
    return StudyPlan.model_validate(values).model_copy(update={"initial": record})


def ours(plan: StudyPlan, absent: dict[int, str] | None = None) -> tuple[Any, dict[str, Memory]]:
    """The study with fedseg's own training, exact mean and server."""
    state = ServerState(state_tensors(Linear()))
    memory = {site: Memory() for site in SITES}
    scaffold = plan.aggregation.strategy == "scaffold"
    for round_ in range(1, ROUNDS + 1):
        total = MeanAccumulator(plan.built.updated)
        control = state.control or {n: np.zeros_like(a) for n, a in state.model.items()}
        for site in SITES:
            if (absent or {}).get(round_) == site:
                continue
            _, update, memory[site] = train_by_strategy(
                Linear(), patients_of(site), plan, round_=round_, site=site, model=state.model,
                control=control if scaffold else {}, memory=memory[site],
            )  # fmt: skip
            total.fold(update, 1)
        presence = Presence(total.weight / len(SITES), summed_rate(plan, round_))
        state = apply_update(state, total.mean(), plan.aggregation, presence)
    return state, memory


def gradient(weights: Weights, site: str) -> Weights:
    """Of the mean squared error over all of a hospital's voxels; weights (2, 3), bias last."""
    total = np.zeros_like(weights)
    for (case,) in patients_of(site).values():
        x = np.concatenate([case.image.reshape(2, -1), np.ones((1, SIDE**3))]).astype(np.float64)
        assert case.label is not None
        wanted = np.eye(2)[case.label.reshape(-1)].T
        total += (weights @ x - wanted) @ x.T / SIDE**3
    return total / 3


def flat(model: Any) -> Weights:
    """The model's tensors as one matrix (2, 3)."""
    weight = model["layer.weight"].reshape(2, 2)
    return np.concatenate([weight, model["layer.bias"][:, None]], axis=1)


def start() -> Weights:
    return flat(state_tensors(Linear()))


def descended(weights: Weights, site: str, correction: Any = lambda _w: 0.0) -> Weights:
    for _ in range(STEPS):
        weights = weights - RATE * (gradient(weights, site) + correction(weights))
    return weights


def pulled(weights: Weights, anchor: Weights, weight: float) -> Weights:
    """The gradient of weight / 2 * ||weights - anchor||^2."""
    return weight * (weights - anchor)


def near(model: Any, reference: Weights) -> None:
    np.testing.assert_allclose(flat(model), reference, rtol=0, atol=1e-9)


def test_fedavg_and_fedprox_follow_their_papers() -> None:
    for mu in (0.0, 0.7):
        x = start()
        for _ in range(ROUNDS):
            pull = partial(pulled, anchor=x, weight=mu)
            x = np.mean([descended(x, site, pull) for site in SITES], axis=0)
        named = {"strategy": "fedprox", "proximal_mu": mu} if mu else {}
        near(ours(plan_of(**named))[0].model, x)


@pytest.mark.parametrize("absent", [{}, {2: "B", 4: "A"}])
def test_scaffold_follows_algorithm_1_with_option_2(absent: dict[int, str]) -> None:
    """Karimireddy et al., ICML 2020: sites send both differences, which ours never does."""
    x, c = start(), np.zeros((2, 3))
    own = {site: np.zeros((2, 3)) for site in SITES}
    for round_ in range(1, ROUNDS + 1):
        steps, changes = [], []
        for site in SITES:
            if absent.get(round_) == site:
                continue
            y = descended(x, site, lambda _w, s=site, c=c: c - own[s])
            new = own[site] - c + (x - y) / (STEPS * RATE)
            steps.append(y - x)
            changes.append(new - own[site])
            own[site] = new
        x = x + np.mean(steps, axis=0)
        c = c + np.mean(changes, axis=0) * len(steps) / len(SITES)
    state, memory = ours(plan_of(strategy="scaffold"), absent)
    near(state.model, x)
    near(state.control, c)
    for site in SITES:
        near(memory[site].control, own[site])


def test_scaffold_corrects_the_drift_that_fedavg_has() -> None:
    """With many local steps FedAvg ends elsewhere than at the minimum of all; SCAFFOLD nearer."""
    best = start()
    for _ in range(4000):
        best = best - 0.05 * np.mean([gradient(best, site) for site in SITES], axis=0)
    distance = {
        name: np.linalg.norm(flat(ours(_longer(plan_of(strategy=name)))[0].model) - best)
        for name in ("fedavg", "scaffold")
    }
    assert distance["scaffold"] < 0.7 * distance["fedavg"]


def _longer(plan: StudyPlan) -> StudyPlan:
    training = plan.training.model_copy(update={"steps_per_round": 60})
    return plan.model_copy(update={"training": training})


SERVERS = {
    "fedavgm": {"server_learning_rate": 0.8, "server_momentum": 0.6},
    "fedadam": {"server_learning_rate": 0.1, "server_momentum": 0.8, "server_beta2": 0.9},
    "fedyogi": {"server_learning_rate": 0.1, "server_momentum": 0.8, "server_beta2": 0.9},
    "fedadagrad": {"server_learning_rate": 0.1, "server_momentum": 0.3},
}


@pytest.mark.parametrize("name", SERVERS)
def test_servers_follow_algorithm_2_of_reddi_et_al(name: str) -> None:
    rule = {"server_beta2": 0.99, "server_tau": 1e-2} | SERVERS[name]
    eta, beta1, beta2 = rule["server_learning_rate"], rule["server_momentum"], rule["server_beta2"]
    x, m, v = start(), np.zeros((2, 3)), np.zeros((2, 3))
    for _ in range(ROUNDS):
        delta = np.mean([descended(x, site) - x for site in SITES], axis=0)
        if name == "fedavgm":
            m = beta1 * m + delta
            x = x + eta * m
            continue
        m = beta1 * m + (1 - beta1) * delta
        v = {
            "fedadam": beta2 * v + (1 - beta2) * delta**2,
            "fedyogi": v - (1 - beta2) * delta**2 * np.sign(v - delta**2),
            "fedadagrad": v + delta**2,
        }[name]
        x = x + eta * m / (np.sqrt(v) + rule["server_tau"])
    kept = {} if name == "fedavgm" else {"server_tau": 1e-2}
    near(ours(plan_of(strategy=name, **SERVERS[name], **kept))[0].model, x)


def test_ditto_follows_its_algorithm_1() -> None:
    """Li et al., ICML 2021: the own model is pulled towards the model that the round brought."""
    weight = 0.5
    x, own = start(), dict.fromkeys(SITES, start())
    for _ in range(ROUNDS):
        pull = partial(pulled, anchor=x, weight=weight)
        own = {site: descended(own[site], site, pull) for site in SITES}
        x = np.mean([descended(x, site) for site in SITES], axis=0)
    state, memory = ours(plan_of(strategy="ditto", ditto_lambda=weight))
    near(state.model, x)
    for site in SITES:
        near(memory[site].own, own[site])
        assert used_here(state.model, memory[site]) is memory[site].own


def test_what_is_personal_stays_and_the_rest_is_averaged() -> None:
    """FedPer and FedBN: here the bias is each hospital's own."""
    plan = plan_of(strategy="fedper")
    record = plan.built.model_copy(update={"personal": ("layer.bias",)})
    plan = plan.model_copy(update={"initial": record})
    x, own = start(), dict.fromkeys(SITES, start()[:, 2])
    for _ in range(ROUNDS):
        ends = {}
        for site in SITES:
            ends[site] = descended(np.column_stack([x[:, :2], own[site]]), site)
            own[site] = ends[site][:, 2]
        x = np.column_stack([np.mean([e[:, :2] for e in ends.values()], axis=0), start()[:, 2]])
    state, memory = ours(plan)
    near(state.model, x)
    for site in SITES:
        assert set(memory[site].personal) == {"layer.bias"}
        near(used_here(state.model, memory[site]), np.column_stack([x[:, :2], own[site]]))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("fedyogi", FedYogi(eta=0.1, beta_1=0.8, beta_2=0.9, tau=1e-2)),
        ("fedadagrad", FedAdagrad(eta=0.1, tau=1e-2)),
        ("fedavgm", FedAvgM(server_learning_rate=0.8, server_momentum=0.6)),
    ],
)
def test_servers_agree_with_flowers(
    name: str, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for FedAdam, whose step Flower corrects for bias and the paper does not."""
    for identity in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, identity, 1)
    rng = np.random.default_rng(5)
    settings = SERVERS[name] | ({} if name == "fedavgm" else {"server_tau": 1e-2})
    settings |= {"server_momentum": 0.0} if name == "fedadagrad" else {}
    rule = Aggregation(strategy=name, **settings)  # type: ignore[arg-type]
    state = ServerState({"w": rng.normal(size=(3, 2)), "b": rng.normal(size=4)})
    for round_ in range(1, 4):
        theirs.current_arrays = {k: v.copy() for k, v in state.model.items()}
        if name == "fedavgm":
            theirs.current_arrays = ArrayRecord({k: Array(v) for k, v in state.model.items()})
        mean = {k: rng.normal(size=v.shape) for k, v in state.model.items()}
        trained = ArrayRecord({k: Array(state.model[k] + mean[k]) for k in mean})
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": trained, "metrics": metrics})
        reply = Message(content, dst_node_id=1, message_type="train")
        found, _ = theirs.aggregate_train(round_, [reply])
        state = apply_update(state, mean, rule)
        for key, value in state.model.items():
            np.testing.assert_allclose(value, found[key].numpy(), rtol=0, atol=1e-9)
