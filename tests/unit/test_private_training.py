"""A round under a guarantee: what each patient adds, and that nothing else shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from private_plans import private_plan
from torch import Tensor, nn

from fedseg.arrays import digest_of, seed_for
from fedseg.errors import DataError, NotFiniteError, PlanError
from fedseg.imaging.transforms import PreparedCase
from fedseg.learning.augment import augment, margin_of
from fedseg.learning.local import RoundOutcome
from fedseg.learning.losses import dice_ce_per_patient
from fedseg.learning.persample.clipped import clipped_sum
from fedseg.learning.persample.memory import choose
from fedseg.learning.private import (
    MEMORY_BYTES,
    clipped_total,
    prepare,
    private_gradient,
    train_round_privately,
)
from fedseg.learning.sampling import PatchSampler, window
from fedseg.models.zoo import build_network, initial_model, load_tensors, state_tensors
from fedseg.plan import StudyPlan
from fedseg.privacy.noise import Noise
from fedseg.promise import NoPrivacy
from fedseg.rates import learning_rate


def case_of(seed: int, *, fill: float | None = None) -> PreparedCase:
    rng = np.random.default_rng(seed)
    label = np.zeros((10, 9, 7), np.uint8)
    label[3:7, 2:6, 2:6] = 1
    image = (label[None] + 0.3 * rng.standard_normal((1, *label.shape))).astype(np.float32)
    if fill is not None:
        image[:] = fill
    return PreparedCase(image, label, np.eye(4), (1.0, 1.0, 1.0))


def extreme_case() -> PreparedCase:
    """Finite voxels with which the network overflows."""
    case = case_of(0)
    return replace(case, image=np.copysign(np.float32(3e38), case.image - 0.5))


PATIENTS = {f"p{i}": [case_of(2 * i), case_of(2 * i + 1)] for i in range(5)}


def train(
    plan: StudyPlan,
    patients: Mapping[str, Sequence[PreparedCase]] = PATIENTS,
    noise: Noise | None = None,
    network: nn.Module | None = None,
    memory_bytes: int = MEMORY_BYTES,
    **options: Any,
) -> tuple[dict[str, Any], RoundOutcome]:
    network = network or build_network(plan.model, plan.task)
    load_tensors(network, initial_model(plan)[1])
    outcome = train_round_privately(
        network, patients, plan, round_=1, site="A", how=prepare(network, plan, memory_bytes),
        noise=noise or Noise.seeded(1, "A"), **options,
    )  # fmt: skip
    return state_tensors(network), outcome


class Broken(Sequence[PreparedCase]):
    """A patient none of whose cases can be read."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        raise self._error


def patches_of(plan: StudyPlan, name: str, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A patient's patches of a step, one by one, as the module's docstring says."""
    task, settings = plan.task, plan.training
    assert plan.private is not None
    margin = margin_of(task.patch_size, task.spacing_mm, settings.augmentation)
    sampler = PatchSampler(
        PATIENTS, window(task.patch_size, 1), window(margin, 0), settings.foreground_share
    )
    rng = np.random.default_rng(seed_for(settings.seed, "A", 0, f"patches 1 {step} {name}"))
    for _ in range(plan.private.patches_per_patient):
        image, label = (torch.from_numpy(array[None]) for array in sampler.draw(name, rng))
        if task.dimensions == 2:
            image, label = image.squeeze(-1), label.squeeze(-1)
        yield augment(
            image, label, margin=margin, spacing_mm=task.spacing_mm,
            settings=settings.augmentation, rng=rng,
        )  # fmt: skip


def double_loss(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, target, reduction="none").flatten(1).mean(1)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_a_draw_in_parts_is_the_sum_of_its_parts_in_their_order(count: int) -> None:
    plan = private_plan(2, promise={"clip_norm": 0.05})
    network = build_network(plan.model, plan.task)
    chance = torch.Generator().manual_seed(3)
    parts = []
    for i in range(count):
        images = torch.randn(3, 1, 8, 8, generator=chance)
        labels = torch.randint(2, (3, 8, 8), generator=chance)
        parts.append(((images, labels), torch.tensor([9 - 2 * i, 8 - 2 * i, 9 - 2 * i])))
    found = clipped_total(network, double_loss, parts, plan)
    expected = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for batch, who in parts:
        for name, part in clipped_sum(network, double_loss, batch, who, 0.05).sum.items():
            expected[name] += part
    assert found.sum.keys() == expected.keys()
    assert all(torch.equal(found.sum[name], expected[name]) for name in expected)
    assert found.patients.tolist() == list(range(10 - 2 * count, 10))
    assert len(found.norms) == 2 * count


def test_a_patient_in_two_parts_of_a_draw_is_refused() -> None:
    plan = private_plan(2)
    part = ((torch.randn(1, 1, 8, 8), torch.zeros(1, 8, 8).long()), torch.tensor([4]))
    with pytest.raises(ValueError, match="twice the clip"):
        clipped_total(build_network(plan.model, plan.task), double_loss, [part, part], plan)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("method", ["stored", "two-pass", "loop"])
def test_a_step_is_each_patient_alone_clipped_summed_noised_and_divided(
    dimensions: int, clipping: str, method: Any
) -> None:
    plan = private_plan(dimensions, promise={"clipping": clipping, "rate": 0.5, "clip_norm": 0.05})
    network = build_network(plan.model, plan.task).double()
    chance = torch.Generator().manual_seed(3)
    side = (8,) * dimensions
    images = torch.randn(7, 1, *side, generator=chance, dtype=torch.float64)
    labels = torch.randint(2, (7, *side), generator=chance)
    who = torch.tensor([2, 0, 2, 5, 5, 0, 2])
    found = private_gradient(
        network, double_loss, (images, labels), who, plan, Noise.seeded(7, "step"), method=method
    )

    source = Noise.seeded(7, "step")
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for patient in (0, 2, 5):
        loss = torch.stack(
            [double_loss(network(images[i : i + 1]), labels[i : i + 1])[0]
             for i in range(7) if who[i] == patient]
        ).mean()  # fmt: skip
        own = dict(zip(total, torch.autograd.grad(loss, list(network.parameters())), strict=True))
        norm = float(sum(float(g.square().sum()) for g in own.values()) ** 0.5)
        share = min(1.0, 0.05 / norm) if clipping == "flat" else 0.05 / (norm + 0.01)
        for name, gradient in own.items():
            total[name] += share * gradient
    for name, part in total.items():
        expected = part + torch.from_numpy(source.gaussian(tuple(part.shape), 1.0 * 0.05))
        expected /= 0.5 * 4
        assert (found[name] - expected).norm() <= 1e-9 * max(1.0, float(expected.norm()))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("prox", [0.0, 0.3])
def test_a_round_equals_an_independent_loop_over_patients(
    dimensions: int, name: str, prox: float
) -> None:
    rule = {"strategy": "fedprox", "proximal_mu": prox} if prox else {}
    plan = private_plan(
        dimensions,
        promise={"rate": 0.6},
        training={"optimiser": {"name": name, "learning_rate": 0.05}},
        aggregation={"rounds": 3, "weighting": "uniform"} | rule,
    )
    start = initial_model(plan)[1]
    found, outcome = train(plan, anchor=start if prox else None)

    network = build_network(plan.model, plan.task)
    load_tensors(network, start)
    source = Noise.seeded(1, "A")
    source.bytes(8)
    own = plan.training.optimiser
    optimiser: torch.optim.Optimizer
    if name == "adamw":
        optimiser = torch.optim.AdamW(network.parameters(), weight_decay=own.weight_decay)
    else:
        optimiser = torch.optim.SGD(
            network.parameters(), weight_decay=own.weight_decay, momentum=own.momentum
        )
    for step in range(2):
        drawn = [p for p, chosen in zip(sorted(PATIENTS), source.chosen(5, 0.6), strict=True)
                 if chosen]  # fmt: skip
        total = [torch.zeros_like(p, dtype=torch.float64) for p in network.parameters()]
        for patient in drawn:
            losses = [
                dice_ce_per_patient(network(x), y)[0] for x, y in patches_of(plan, patient, step)
            ]
            own_gradient = torch.autograd.grad(
                torch.stack(losses).mean(), list(network.parameters())
            )
            norm = sum(float(g.double().square().sum()) for g in own_gradient) ** 0.5
            for part, gradient in zip(total, own_gradient, strict=True):
                part.add_(min(1.0, 0.5 / norm) * gradient.double())
        for parameter, part in zip(network.parameters(), total, strict=True):
            noisy = (part + torch.from_numpy(source.gaussian(tuple(part.shape), 0.5))) / (0.6 * 4)
            parameter.grad = noisy.float()
        for key, parameter in network.named_parameters():
            parameter.grad += prox * (parameter.detach() - torch.tensor(start[key]))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(plan, 1, step)
        optimiser.step()
    expected = state_tensors(network)
    for key, value in found.items():
        # AdamW's first step has the size of the learning rate whatever the gradient: signs of
        # gradients near zero may differ by rounding, so the bound is on the whole tensor.
        assert np.linalg.norm(value - expected[key]) <= 2e-3 * np.linalg.norm(
            expected[key] - start[key]
        )
    assert outcome.steps == 2 and outcome.lost == 0


def test_equal_sources_give_equal_bits_and_the_system_never_does() -> None:
    plan = private_plan(promise={"rate": 0.5}, model={"dropout": 0.2})
    first, outcome = train(plan)
    torch.rand(3)
    again, repeated = train(plan)
    assert digest_of(first) == digest_of(again)
    assert digest_of(outcome.optimiser_state) == digest_of(repeated.optimiser_state)
    fresh, _ = train(plan, noise=Noise.from_system())
    assert digest_of(fresh) != digest_of(first)


def test_one_patient_more_moves_nobody_elses_gradient() -> None:
    plan = private_plan(noise=0.05, training={"steps_per_round": 1, "optimiser": {
        "name": "sgd", "learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0}},
        aggregation={"rounds": 9})  # fmt: skip
    clip, share, rate = 0.5, 1.0 * 4, learning_rate(plan, 1, 0)
    without = {name: cases for name, cases in PATIENTS.items() if name != "p0"}
    with_all, _ = train(plan)
    less, _ = train(plan, without)
    moved = sum(float(np.square(with_all[k].astype(float) - less[k]).sum()) for k in less) ** 0.5
    assert 0 < moved <= rate * clip / share * (1 + 1e-3)


@pytest.mark.parametrize(
    "trouble",
    [
        Broken(DataError("this case cannot be read")),
        Broken(OSError("no such file")),
        Broken(ValueError("bad header")),
        [case_of(0, fill=float("nan"))],
        [case_of(0, fill=float("inf"))],
        [extreme_case()],
        [],
        [PreparedCase(np.zeros((1, 9, 9, 9), np.float32), None, np.eye(4), (1.0, 1.0, 1.0))],
        [PreparedCase(np.zeros((1, 9, 9, 9), np.float32), np.full((9, 9, 9), 7, np.uint8),
                      np.eye(4), (1.0, 1.0, 1.0))],
    ],
)  # fmt: skip
def test_a_patient_that_cannot_be_used_contributes_zero(trouble: Any) -> None:
    plan = private_plan()
    healthy = {name: cases for name, cases in PATIENTS.items() if name != "p2"}
    expected, _ = train(plan, healthy)
    found, outcome = train(plan, PATIENTS | {"p2": trouble})
    assert outcome.lost == 2 and outcome.steps == 2
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_allclose(found[key], expected[key], atol=1e-5)


def test_an_empty_draw_still_adds_noise_and_takes_its_steps() -> None:
    plan = private_plan()
    found, outcome = train(plan, dict.fromkeys(PATIENTS, Broken(OSError("gone"))))
    start = initial_model(plan)[1]
    assert (outcome.steps, outcome.loss, outcome.lost) == (2, None, 10)
    assert all(not np.array_equal(found[key], start[key]) for key in found)
    nobody, _ = train(plan, {})
    assert nobody.keys() == found.keys()


def test_noise_is_what_the_plan_says_and_the_divisor_is_declared() -> None:
    plan = private_plan(3, noise=2.0, promise={"rate": 0.25, "expected_patients": 40})
    network = build_network(plan.model, plan.task)
    none = torch.zeros(0, dtype=torch.long)
    drawn = [
        private_gradient(network, dice_ce_per_patient, None, none, plan, Noise.seeded(i, "n"))
        for i in range(8)
    ]
    values = torch.cat([t.flatten() for one in drawn for t in one.values()])
    expected = 2.0 * 0.5 / (0.25 * 40)
    assert float(values.std()) == pytest.approx(expected, rel=0.03)
    assert abs(float(values.mean())) < 0.05 * expected


def test_small_memory_gives_the_same_round() -> None:
    plan = private_plan()
    whole, _ = train(plan)
    short, _ = train(plan, memory_bytes=300_000)
    for key in whole:
        np.testing.assert_allclose(short[key], whole[key], atol=1e-5)
    with pytest.raises(PlanError, match="MiB"):
        train(plan, memory_bytes=1000)


def test_what_fits_into_memory_is_found_out_once_and_not_every_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, looked = private_plan(), []

    def counted(*args: Any) -> Any:
        looked.append(args)
        return choose(*args)

    monkeypatch.setattr("fedseg.learning.private.choose", counted)
    network = build_network(plan.model, plan.task).eval()
    load_tensors(network, initial_model(plan)[1])
    how = prepare(network, plan)
    assert not network.training
    for round_ in (1, 2):
        train_round_privately(
            network, PATIENTS, plan, round_=round_, site="A", how=how, noise=Noise.seeded(1, "A")
        )
    assert len(looked) == 1


def test_frozen_parts_stay_bit_for_bit() -> None:
    plan = private_plan()
    network = build_network(plan.model, plan.task)
    names = [name for name, _ in network.named_parameters()]
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name == names[-1])
    found, outcome = train(plan, network=network)
    start = initial_model(plan)[1]
    assert [key for key in found if not np.array_equal(found[key], start[key])] == [names[-1]]
    assert {key.split("/")[1] for key in outcome.optimiser_state} == {names[-1]}


def test_weights_that_run_away_are_an_error() -> None:
    plan = private_plan(
        training={"optimiser": {"name": "sgd", "learning_rate": 1e38, "weight_decay": 1e5}}
    )
    with pytest.raises(NotFiniteError, match="learning_rate"):
        train(plan)


class Counting(nn.Module):
    """Keeps a sum of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.detach().sum()
        out: Tensor = self.layer(x)
        return out


def test_a_network_that_remembers_what_it_saw_is_refused() -> None:
    with pytest.raises(PlanError, match="'seen'"):
        prepare(Counting(), private_plan())


def test_a_plan_without_a_guarantee_is_not_trained_privately() -> None:
    plan = private_plan()
    plain = plan.model_copy(update={"privacy": NoPrivacy()})
    with pytest.raises(PlanError, match="no guarantee"):
        train(plain)
