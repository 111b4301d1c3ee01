"""Canaries: patients whose gradient is known, sent through the trainer's own step.

A canary's samples all point along one coordinate of the model, far beyond the clip norm, and no two
canaries share one: each is the worst patient that the guarantee allows, and none is in another's
way. Half of them, by fair coins, are the cohort of a whole study: each step draws, clips, sums,
adds noise and divides by `fedseg.learning.private`, as it does for patients. What is released in a
canary's coordinate is all that anybody can know of it.

The canary network has the tensors that the plan trains, by name, each cut to the coordinates that
canaries use: time and memory depend on the number of canaries, not on the network's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedseg.arrays import seed_for
from fedseg.learning.persample.gradients import Batch
from fedseg.learning.private import private_gradient, promise_of
from fedseg.plan import StudyPlan
from fedseg.privacy.audit.bounds import Flags, Floats
from fedseg.privacy.noise import Noise

AT_ONCE = 2000  # canaries in one run
MOST_SAMPLES = 4  # of one canary
MEMORY_BYTES = 512 * 1024**2

Step = Callable[..., dict[str, Tensor]]
Source = Callable[[str], Noise]


@dataclass(frozen=True)
class Transcript:
    """What runs of a study released about canaries, and who took part.

    Attributes:
        values: (steps, canaries), the noisy sum in each canary's coordinate over C: about 1 in the
            steps in which it was drawn, about 0 else.
        members: (canaries,), who was in the cohort.
        tensors: (canaries,), the number of the tensor that the coordinate lies in.
        names: of the tensors.
    """

    values: Floats
    members: Flags
    tensors: NDArray[np.int64]
    names: tuple[str, ...]

    @property
    def quiet(self) -> Floats:
        """What was released where nobody contributed: noise alone, (steps, non-members)."""
        return self.values[:, ~self.members]


class Coordinates(nn.Module):
    """A network whose output for the input (coordinate, factor) is factor * parameter."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        for name, size in sizes.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(torch.zeros(size)))
        self.whole = nn.Identity()  # with a part, its own parameters are copied for each sample

    def forward(self, x: Tensor) -> Tensor:
        """Map (samples, 2) to (samples,)."""
        own = [p.expand(len(x), -1) for p in self._parameters.values() if p is not None]
        every = self.whole(torch.cat(own, 1))
        return every.gather(1, x[:, :1].long()).squeeze(1) * x[:, 1]  # type: ignore[no-any-return]


def transcript(
    plan: StudyPlan,
    sizes: Mapping[str, int],
    canaries: int,
    seed: int,
    *,
    step: Step = private_gradient,
    source: Source | None = None,
    progress: Callable[[str], None] = lambda _run: None,
) -> Transcript:
    """Run whole studies of canaries and keep all that is released.

    Args:
        plan: private and built; its schedule, rate, clip norm and noise are used as they are.
        sizes: trained tensors of the plan's network by name, and how many numbers each has.
        canaries: in all; at most 2,000, and one a coordinate, are in one run.
        seed: decides who takes part.
        step: stands in for `private_gradient`.
        source: of noise and draws, by purpose; seeded where it is not said.
        progress: is told of each step.

    Raises:
        PlanError: the plan has no guarantee, or was not built.
        ValueError: no canary, or nothing that is trained.
    """
    if canaries < 1 or not sum(sizes.values()):
        raise ValueError("an audit needs canaries, and parameters that are trained")
    found = []
    for run, count in enumerate(_runs(canaries, sum(sizes.values()))):
        chance = np.random.default_rng(seed_for(seed, "", run, "canaries"))
        purpose = f"audit run {run}"
        noise = source(purpose) if source else Noise.seeded(seed, purpose)
        own = _cut(sizes, count)
        members, values = _run(plan, own, chance, step, noise, progress)
        places = [list(sizes).index(name) for name in own]
        found.append((values, members, np.repeat(places, list(own.values()))))
    values, members, tensors = (np.concatenate(each, axis=-1) for each in zip(*found, strict=True))
    return Transcript(values, members, tensors, tuple(sizes))


def steps_of(plan: StudyPlan, canaries: int, sizes: Mapping[str, int]) -> int:
    """How many steps `transcript` takes, for a progress display."""
    return _steps(plan) * len(list(_runs(canaries, sum(sizes.values()))))


def _run(
    plan: StudyPlan,
    sizes: Mapping[str, int],
    chance: np.random.Generator,
    step: Step,
    noise: Noise,
    progress: Callable[[str], None],
) -> tuple[Flags, Floats]:
    """One study of as many canaries as there are coordinates: who took part, and the values."""
    promise = promise_of(plan)
    network, count = Coordinates(sizes), sum(sizes.values())
    members = chance.random(count) < 0.5
    cohort, order = np.flatnonzero(members), list(network._parameters)
    declared = promise.rate * promise.expected_patients / promise.clip_norm
    released = np.empty((_steps(plan), count))
    for row in released:
        drawn = cohort[noise.chosen(len(cohort), promise.rate)]
        batch, patients = _batch(plan, drawn)
        at_once = max(1, MEMORY_BYTES // (16 * count))
        found = step(
            network, _loss, batch, patients, plan, noise, method="stored", samples_at_once=at_once
        )
        row[:] = torch.cat([found[name].reshape(-1) for name in order]).numpy() * declared
        progress("step")
    return members, released


def _batch(plan: StudyPlan, drawn: NDArray[np.intp]) -> tuple[Batch | None, Tensor]:
    """The samples of drawn canaries; all of one canary's ask for the same."""
    promise = promise_of(plan)
    each = min(promise.patches_per_patient, MOST_SAMPLES)
    patients = torch.from_numpy(np.repeat(drawn, each))
    if not len(patients):
        return None, patients
    inputs = torch.stack(
        [patients.float(), torch.full((len(patients),), _strength(promise.clip_norm))], 1
    )
    return (inputs, torch.zeros(len(patients))), patients


def _strength(clip_norm: float) -> float:
    """A gradient's norm that is clipped to C under both kinds of clipping, or nearly."""
    return 1.0 + 10.0 * clip_norm


def _loss(outputs: Tensor, _targets: Tensor) -> Tensor:
    """The output is the loss."""
    return outputs


def _runs(canaries: int, coordinates: int) -> Iterator[int]:
    """Canaries of each run."""
    at_once = min(AT_ONCE, coordinates)
    while canaries > 0:
        yield min(canaries, at_once)
        canaries -= at_once


def _cut(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """So many coordinates in all, spread over the tensors as evenly as they are long enough."""
    found, left = {}, count
    ranked = sorted(sizes, key=lambda name: sizes[name])
    for place, name in enumerate(ranked):
        found[name] = min(sizes[name], left // (len(ranked) - place))
        left -= found[name]
    return {name: found[name] for name in sizes if found[name]}


def _steps(plan: StudyPlan) -> int:
    """Training steps of the whole study."""
    return plan.aggregation.rounds * plan.training.steps_per_round
