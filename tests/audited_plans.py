"""Plans for audits, and the faults that an audit must find: wrappers around the trainer's step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from private_plans import private_plan
from torch import Tensor

from fedseg.learning.private import private_gradient
from fedseg.plan import StudyPlan
from fedseg.privacy.accounting import calibrate
from fedseg.privacy.audit.canaries import Step
from fedseg.privacy.noise import Noise

EXPECTED = 1000
SIZES = {"down.weight": 1800, "down.bias": 8, "up.weight": 600}


@lru_cache
def scored_plan(evaluations: int = 4, epsilon: float = 1.0) -> StudyPlan:
    """A plan that releases dice and nsd of two labels, calibrated at delta 1e-5."""
    metrics = calibrate(epsilon, 1e-5, [(1.0, evaluations)])
    plan = private_plan(
        noise=calibrate(epsilon, 1e-5, [(1.0, evaluations)]),
        metrics=metrics,
        promise={"epsilon": epsilon, "delta": 1e-5, "expected_validation": 7},
        training={"steps_per_round": 1},
        aggregation={"rounds": evaluations},
    )
    task = plan.task.model_copy(update={"labels": {"ball": 1, "shell": 2}})
    evaluation = plan.evaluation.model_copy(update={"metrics": ("dice", "nsd")})
    return plan.model_copy(update={"task": task, "evaluation": evaluation})


@lru_cache
def audited_plan(rate: float = 1.0, steps: int = 5, epsilon: float = 1.0) -> StudyPlan:
    """A calibrated plan at delta 1e-5; three patches a patient."""
    noise = calibrate(epsilon, 1e-5, [(rate, steps)])
    promise = {
        "epsilon": epsilon, "delta": 1e-5, "clip_norm": 0.5, "rate": rate,
        "expected_patients": EXPECTED, "patches_per_patient": 3,
    }  # fmt: skip
    return private_plan(
        noise=noise,
        promise=promise,
        training={"steps_per_round": 1},
        aggregation={"rounds": steps},
    )


class WrongNoise(Noise):
    """A source whose Gaussian noise has another standard deviation than it was asked for."""

    def __init__(self, honest: Noise, altered: Callable[[float], float]) -> None:
        super().__init__(bytes(honest.bytes(32)))
        self._altered = altered

    def gaussian(self, shape: tuple[int, ...], sigma: float) -> NDArray[np.float64]:
        return super().gaussian(shape, self._altered(sigma))


def _with_noise(altered: Callable[[float], float]) -> Step:
    def step(network: Any, loss: Any, batch: Any, patients: Any, plan: Any, noise: Noise,
             **how: Any) -> dict[str, Tensor]:  # fmt: skip
        wrong = WrongNoise(noise, altered)
        return private_gradient(network, loss, batch, patients, plan, wrong, **how)

    return step


def _clip_per_patch(
    network: Any, loss: Any, batch: Any, patients: Tensor, plan: Any, noise: Noise, **how: Any
) -> dict[str, Tensor]:
    """Each patch is taken for a patient."""
    alone = torch.arange(len(patients))
    return private_gradient(network, loss, batch, alone, plan, noise, **how)


def _divided_twice(
    network: Any, loss: Any, batch: Any, patients: Any, plan: StudyPlan, noise: Noise, **how: Any
) -> dict[str, Tensor]:
    """Noise that was divided by the declared patients before it was added, and then once more."""
    promise = plan.private
    assert promise is not None
    declared = promise.rate * promise.expected_patients
    step = _with_noise(lambda sigma: sigma / declared)
    return step(network, loss, batch, patients, plan, noise, **how)


FAULTS: dict[str, Step] = {
    "no noise": _with_noise(lambda _sigma: 0.0),
    "half the noise": _with_noise(lambda sigma: sigma / 2),
    "clip per patch": _clip_per_patch,
    "noise divided twice": _divided_twice,
}


class FixedSize(Noise):
    """Draws batches of the expected size."""

    def chosen(self, count: int, rate: float) -> NDArray[np.bool_]:
        found = np.zeros(count, bool)
        found[self._order(count)[: round(rate * count)]] = True
        return found

    def _order(self, count: int) -> NDArray[np.intp]:
        return np.argsort(self._words(count))


class Shuffled(FixedSize):
    """Goes through shuffles of the patients: each is drawn once an epoch."""

    def __init__(self, key: bytes | None) -> None:
        super().__init__(key)
        self._left: list[int] = []

    def _order(self, count: int) -> NDArray[np.intp]:
        if not self._left:
            self._left = list(super()._order(count))
        turn, self._left = self._left[: count // 10], self._left[count // 10 :]
        return np.array(turn)


class Favourites(Noise):
    """Draws the first half of the patients more often than the second."""

    def chosen(self, count: int, rate: float) -> NDArray[np.bool_]:
        first = super().chosen(count // 2, 1.3 * rate)
        return np.concatenate([first, super().chosen(count - count // 2, 0.7 * rate)])
