"""The trainer's own round under the audit's eyes: whom it draws, its noise, one patient's share.

`train_round_privately` is run for a step with plain gradient descent, at a learning rate that makes
the change of the weights the noisy sum itself, in units of C. Patients that cannot be read
contribute zero, so that such a step shows the draw and the noise alone; and of two steps with equal
chance that differ in one patient, the difference is what that patient contributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedseg.arrays import seed_for
from fedseg.errors import DataError
from fedseg.imaging.transforms import PreparedCase
from fedseg.learning.optimiser import trained
from fedseg.learning.persample.memory import Schedule as Micro
from fedseg.learning.private import prepare, promise_of, train_round_privately
from fedseg.learning.sampling import Patients
from fedseg.models.parts import freeze
from fedseg.models.zoo import build_network
from fedseg.plan import StudyPlan
from fedseg.privacy.audit.bounds import Flags, Floats
from fedseg.privacy.noise import Noise
from fedseg.promise import Calibration
from fedseg.training import Augmentation, Optimiser, Schedule

TIGHT = 1e-4  # a clip norm below any real gradient's
FAINT = 0.05  # noise that leaves float32 room for a patient's share


@dataclass(frozen=True)
class Idle:
    """What rounds on unreadable patients showed.

    Attributes:
        drawn: (steps, patients), who was asked for.
        noise: (steps, numbers), what was released, over C.
    """

    drawn: Flags
    noise: Floats


def idle_rounds(plan: StudyPlan, patients: int, steps: int, noise: Noise) -> Idle:
    """Steps of the trainer's round in which nobody can be read, with a network of one layer."""
    task = plan.task.model_copy(update={"patch_size": (2,) * plan.task.dimensions})
    plan = _single_step(plan.model_copy(update={"task": task}), patches_per_patient=1)
    kind = nn.Conv3d if task.dimensions == 3 else nn.Conv2d
    network = kind(len(task.channels), 1 + len(task.labels), 1)
    how, drawn, released = prepare(network, plan), np.zeros((steps, patients), bool), []
    for row in drawn:
        nobody = _Unreadable(patients)
        nn.init.zeros_(network.weight)
        nn.init.zeros_(network.bias)  # type: ignore[arg-type]
        released.append(_step(network, nobody, plan, noise, how))
        row[list(nobody.asked)] = True
    return Idle(drawn, np.stack(released))


def one_patients_share(plan: StudyPlan, seed: int) -> float:
    """The norm over C of what one patient adds to a step of the plan's own network.

    The patient is made of noise, brings as many patches as the plan says, and its gradient is far
    beyond C, which is set low for the purpose: 1 is right, more is a broken promise.

    Raises:
        PlanError: the plan has no guarantee, or its network none per patient.
    """
    plan = _single_step(plan, clip_norm=TIGHT, rate=1.0, clipping="flat")
    plan = plan.model_copy(update={"calibrated": Calibration(training=FAINT)})
    steps = []
    for patients in ({"patient": [_made_up(plan, seed)]}, _Unreadable(1)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, "", 0, "audited network"))
            network = build_network(plan.model, plan.task)
        freeze(network, plan.training.trainable)
        noise = Noise.seeded(seed, "audit share")
        steps.append(_step(network, patients, plan, noise, prepare(network, plan)))
    return float(np.linalg.norm(steps[0] - steps[1]))


def _step(
    network: nn.Module, patients: Patients, plan: StudyPlan, noise: Noise, how: Micro
) -> Floats:
    """The noisy sum of one step, over C."""
    before = _weights(network)
    train_round_privately(network, patients, plan, round_=1, site="audit", noise=noise, how=how)
    return before - _weights(network)


def _weights(network: nn.Module) -> Floats:
    """What is trained, as one vector."""
    own = [p.detach().double().reshape(-1) for p in trained(network).values()]
    return np.asarray(torch.cat(own).numpy())


def _single_step(plan: StudyPlan, **changes: Any) -> StudyPlan:
    """The plan for one step of plain descent, whose weights move by the noisy sum over C."""
    promise = promise_of(plan).model_copy(update=changes)
    rate = promise.rate * promise.expected_patients / promise.clip_norm
    descent = Optimiser(
        name="sgd", learning_rate=rate, weight_decay=0.0, momentum=0.0, state="reset"
    )
    training = plan.training.model_copy(
        update={
            "steps_per_round": 1,
            "augmentation": Augmentation(),
            "optimiser": descent,
            "schedule": Schedule(name="constant", warmup_rounds=0),
        }
    )
    plainly = plan.aggregation.model_copy(update={"strategy": "fedavg", "proximal_mu": 0.0})
    return plan.model_copy(
        update={"privacy": promise, "training": training, "aggregation": plainly}
    )


def _made_up(plan: StudyPlan, seed: int) -> PreparedCase:
    """A case of noise, twice as long as a patch on each side."""
    task, rng = plan.task, np.random.default_rng(seed)
    x, y, z = (*(2 * n for n in task.patch_size), 2)[:3]
    image = rng.standard_normal((len(task.channels), x, y, z)).astype(np.float32)
    label = rng.integers(0, 1 + len(task.labels), (x, y, z)).astype(np.uint8)
    a, b, c = (*task.spacing_mm, 1.0)[:3]
    return PreparedCase(image, label, np.eye(4), (a, b, c))


class _Unreadable(Mapping[str, Sequence[PreparedCase]]):
    """Patients whose cases cannot be read, and who was asked for."""

    def __init__(self, count: int) -> None:
        self._names = {f"{number:06d}": number for number in range(count)}
        self.asked: set[int] = set()

    def __getitem__(self, patient: str) -> Sequence[PreparedCase]:
        self.asked.add(self._names[patient])
        raise DataError("a patient of the audit cannot be read")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
