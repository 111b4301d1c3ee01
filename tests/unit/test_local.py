"""One round of training at one site."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedseg.arrays import Arrays, digest_of
from fedseg.errors import DataError, RoundError
from fedseg.imaging.transforms import PreparedCase
from fedseg.learning.local import RoundOutcome, train_round
from fedseg.learning.repeatable import repeatable
from fedseg.models.zoo import build_network, initial_model, load_tensors, state_tensors
from fedseg.plan import StudyPlan
from fedseg.rates import learning_rate

AUGMENTATION = {
    "flip_axes": [0], "rotation_degrees": 10, "scaling": 0.1, "noise": 0.05, "brightness": 0.1,
    "contrast": 0.1, "gamma": 0.1,
}  # fmt: skip


def plan_of(dimensions: int = 3, aggregation: Any = None, **training: Any) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "study": "tiny",
            "task": {
                "dimensions": dimensions,
                "channels": [{"name": "T1", "modality": "MR"}],
                "labels": {"ball": 1},
                "spacing_mm": [1.0] * dimensions,
                "patch_size": [8] * dimensions,
            },
            "model": {"options": {"channels": [4, 8], "residual_units": 1, "dropout": 0.1}},
            "training": {"steps_per_round": 3, "augmentation": AUGMENTATION} | training,
            "aggregation": {"rounds": 5} | (aggregation or {}),
        }
    )


def case_of(seed: int) -> PreparedCase:
    rng = np.random.default_rng(seed)
    label = np.zeros((10, 9, 7), np.uint8)
    label[3:7, 2:6, 2:6] = 1
    image = label[None] + 0.3 * rng.standard_normal((1, *label.shape))
    return PreparedCase(image.astype(np.float32), label, np.eye(4), (1.0, 1.0, 1.0))


PATIENTS = {f"p{i}": [case_of(2 * i), case_of(2 * i + 1)] for i in range(3)}


def train(
    plan: StudyPlan, rounds: tuple[int, ...] = (1,), model: Arrays | None = None, **options: Any
) -> tuple[Arrays, RoundOutcome]:
    network = build_network(plan.model, plan.task)
    load_tensors(network, model or initial_model(plan)[1])
    for round_ in rounds:
        outcome = train_round(network, PATIENTS, plan, round_=round_, site="A", **options)
        if plan.training.optimiser.state == "keep":
            options["optimiser_state"] = outcome.optimiser_state
    return state_tensors(network), outcome


@pytest.mark.parametrize("dimensions", [2, 3])
def test_equal_rounds_give_equal_bits_whatever_ran_before(dimensions: int) -> None:
    plan = plan_of(dimensions)
    torch.manual_seed(1)
    first, outcome = train(plan)
    torch.rand(7)
    np.random.default_rng().random()
    state = torch.random.get_rng_state()
    again, repeated = train(plan)
    assert digest_of(first) == digest_of(again)
    assert outcome.loss == repeated.loss and outcome.steps == 3
    assert digest_of(outcome.optimiser_state) == digest_of(repeated.optimiser_state)
    assert digest_of(first) != digest_of(initial_model(plan)[1])
    torch.random.set_rng_state(state)


def test_the_global_generator_and_threads_are_left_alone() -> None:
    threads, before = torch.get_num_threads(), torch.random.get_rng_state()
    network = build_network(plan_of().model, plan_of().task)
    torch.random.set_rng_state(before)
    train_round(network, PATIENTS, plan_of(threads=2), round_=1, site="A")
    assert torch.get_num_threads() == threads
    assert torch.equal(before, torch.random.get_rng_state())
    with repeatable(2, 0, torch.device("cpu")):
        assert torch.get_num_threads() == 2


def test_equal_work_is_done_by_cudnn_without_rounding_to_fewer_bits() -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.enabled, cudnn.allow_tf32
    assert before[0]
    with repeatable(1, 0, torch.device("cpu")):
        assert cudnn.enabled and cudnn.deterministic and not cudnn.allow_tf32
    assert (cudnn.enabled, cudnn.allow_tf32) == before


def test_sites_rounds_and_seeds_draw_differently() -> None:
    plan = plan_of()
    _, start = initial_model(plan)
    losses = {train(plan, (r,), model=start)[1].loss for r in (1, 2)}
    other = plan_of(seed=1)
    losses |= {train(other, model=start)[1].loss}
    network = build_network(plan.model, plan.task)
    load_tensors(network, start)
    losses |= {train_round(network, PATIENTS, plan, round_=1, site="B").loss}
    assert len(losses) == 4


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_kept_optimiser_continues_bit_for_bit(name: str) -> None:
    """Two rounds through arrays equal two rounds in which the optimiser never stopped."""
    plan = plan_of(optimiser={"name": name, "learning_rate": 0.01})
    whole, outcome = train(plan, (1, 2))
    middle, first = train(plan, (1,))
    stored = {key: array.copy() for key, array in first.optimiser_state.items()}
    resumed, second = train(plan, (2,), model=middle, optimiser_state=stored)
    assert digest_of(whole) == digest_of(resumed)
    assert digest_of(outcome.optimiser_state) == digest_of(second.optimiser_state)
    anew, _ = train(plan, (2,), model=middle)
    assert digest_of(anew) != digest_of(resumed)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_round_is_the_plain_loop(name: str) -> None:
    """Same batches, torch's own optimiser, never stopped: the same weights to the last bit."""
    from fedseg.arrays import seed_for
    from fedseg.learning.local import _batches
    from fedseg.learning.losses import dice_ce_per_patient

    plan = plan_of(optimiser={"name": name}, schedule={"name": "constant", "warmup_rounds": 0})
    network = build_network(plan.model, plan.task)
    load_tensors(network, initial_model(plan)[1])
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    more = {"momentum": 0.9} if name == "sgd" else {}
    optimiser = make(network.parameters(), lr=1e-3, weight_decay=1e-5, fused=True, **more)
    for round_ in (1, 2):
        with repeatable(1, seed_for(0, "A", round_, "network"), torch.device("cpu")):
            for images, labels, some in _batches(PATIENTS, plan, round_, "A", torch.device("cpu")):
                assert some is None  # all are annotated with everything
                optimiser.zero_grad()
                dice_ce_per_patient(network(images), labels).mean().backward()
                nn.utils.clip_grad_norm_(network.parameters(), 12.0)
                optimiser.step()
    assert digest_of(state_tensors(network)) == digest_of(train(plan, (1, 2))[0])


def test_a_round_reduces_the_loss() -> None:
    plan = plan_of(
        steps_per_round=40,
        optimiser={"learning_rate": 0.01},
        schedule={"name": "constant", "warmup_rounds": 0},
    )
    start, first = train(plan, (1,))
    _, second = train(plan, (2,), model=start, optimiser_state=first.optimiser_state)
    assert second.loss < 0.7 * first.loss


def test_fedprox_pulls_towards_the_rounds_model() -> None:
    free = plan_of(steps_per_round=10, optimiser={"name": "sgd", "learning_rate": 0.05})
    tied = StudyPlan.model_validate(
        free.model_dump(mode="json")
        | {"aggregation": {"rounds": 5, "strategy": "fedprox", "proximal_mu": 10.0}}
    )
    _, start = initial_model(free)

    def distance(arrays: Arrays) -> float:
        return float(sum(np.square(arrays[n] - a).sum() for n, a in start.items()))  # type: ignore[operator]

    assert distance(train(tied, anchor=start)[0]) < 0.8 * distance(train(free)[0])
    with pytest.raises(ValueError, match="anchor"):
        train(tied)


def test_the_proximal_term_is_a_gradient_of_mu_times_the_distance() -> None:
    """With a huge clip and plain SGD the two first steps differ by rate * mu * (w - anchor)."""
    settings: dict[str, Any] = {
        "steps_per_round": 1,
        "gradient_clip_norm": None,
        "optimiser": {"name": "sgd", "learning_rate": 0.5, "momentum": 0.0, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup_rounds": 0},
    }
    free = plan_of(**settings)
    tied = plan_of(aggregation={"strategy": "fedprox", "proximal_mu": 0.2}, **settings)
    _, start = initial_model(free)
    anchor = {name: array + 1 for name, array in start.items()}  # type: ignore[operator]
    pulled, without = train(tied, anchor=anchor)[0], train(free)[0]
    for name, array in pulled.items():
        np.testing.assert_allclose(array - without[name], 0.5 * 0.2, atol=1e-6)  # type: ignore[operator]


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    plan = plan_of(steps_per_round=4, optimiser={"learning_rate": 1.0})
    rates = [learning_rate(plan, r, s) for r in range(1, 6) for s in range(4)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.5) and 0 < rates[-1] < 0.02
    flat = plan_of(schedule={"name": "constant", "warmup_rounds": 0})
    assert {learning_rate(flat, r, s) for r in (1, 5) for s in (0, 2)} == {1e-3}


def test_a_clipped_gradient_moves_no_further_than_the_clip() -> None:
    plan = plan_of(
        steps_per_round=1,
        gradient_clip_norm=0.01,
        optimiser={"name": "sgd", "learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0},
        schedule={"name": "constant", "warmup_rounds": 0},
    )
    _, start = initial_model(plan)
    moved, _ = train(plan)
    length = sum(np.square(moved[n] - a).sum() for n, a in start.items()) ** 0.5  # type: ignore[operator]
    assert length == pytest.approx(0.01, rel=1e-3)


def test_a_reset_optimiser_has_no_state_to_keep() -> None:
    plan = plan_of(optimiser={"state": "reset"})
    _, outcome = train(plan)
    assert outcome.optimiser_state == {}
    with pytest.raises(ValueError, match="resets"):
        train(plan, optimiser_state={"step/model": np.ones(())})


def test_a_state_of_another_network_or_optimiser_is_refused() -> None:
    plan = plan_of()
    name = next(iter(initial_model(plan)[1]))
    for key, shape in (
        (f"momentum_buffer/{name}", ()),
        ("exp_avg/x", ()),
        (f"exp_avg/{name}", (9,)),
    ):
        with pytest.raises(RoundError, match="does not fit"):
            train(plan, optimiser_state={key: np.ones(shape, np.float32)})


@pytest.mark.parametrize("damage", ["image", "weights"])
def test_numbers_that_are_not_finite_end_the_round(damage: str) -> None:
    plan = plan_of()
    network = build_network(plan.model, plan.task)
    patients = PATIENTS
    if damage == "image":
        image = np.full((1, 8, 8, 8), np.nan, np.float32)
        patients = {"p": [PreparedCase(image, np.ones((8, 8, 8), np.uint8), np.eye(4), (1, 1, 1))]}
    else:
        next(network.parameters()).data.fill_(float("inf"))
    with pytest.raises(RoundError, match=r"not finite .*round 1, step 0"):
        train_round(network, patients, plan, round_=1, site="A")


@pytest.mark.parametrize("patients", [{}, {"p": []}])
def test_a_site_without_cases_cannot_train(patients: dict[str, list[PreparedCase]]) -> None:
    network = build_network(plan_of().model, plan_of().task)
    with pytest.raises(DataError, match="at least one patient"):
        train_round(network, patients, plan_of(), round_=1, site="A")
