"""One round of training at one site under a guarantee for each of its patients.

A step: every patient is drawn by itself, brings a few patches, and gives one gradient, clipped
once; the sum and Gaussian noise are divided by a number that the plan declares. All after that is
post-processing. Who is drawn, and what a network draws inside (dropout), comes from the noise's
source alone; which patches a patient brings depends on the plan's seed, the step and that patient,
so that one patient more or less moves nobody else's gradient.

Nothing that leaves may depend on one patient besides: whoever cannot be read contributes zero, an
empty draw answers like any other, and no step ends the round early.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fedseg.arrays import Arrays, seed_for
from fedseg.errors import NotFiniteError, PlanError
from fedseg.learning.augment import augment, margin_of
from fedseg.learning.local import RoundOutcome, require_fitting_state
from fedseg.learning.losses import annotated_rows, dice_ce_per_patient
from fedseg.learning.optimiser import (
    build_optimiser,
    optimiser_arrays,
    restore_optimiser,
    trained,
)
from fedseg.learning.persample.clipped import ClippedSum, clipped_sum, merge, zero_sum
from fedseg.learning.persample.examine import Examination, examine
from fedseg.learning.persample.gradients import Batch, Loss, Method
from fedseg.learning.persample.memory import Schedule, choose
from fedseg.learning.repeatable import repeatable
from fedseg.learning.sampling import PatchSampler, Patients, window
from fedseg.plan import StudyPlan
from fedseg.privacy.noise import Noise
from fedseg.promise import LocalPrivacy
from fedseg.rates import learning_rate

MEMORY_BYTES = 2 * 1024**3

Part = tuple[Batch, Tensor]


def private_gradient(
    network: nn.Module,
    loss: Loss,
    batch: Batch | None,
    patients: Tensor,
    plan: StudyPlan,
    noise: Noise,
    *,
    method: Method = "stored",
    samples_at_once: int | None = None,
) -> dict[str, Tensor]:
    """The gradient of one private step: clipped sum, plus noise, over the declared number.

    Args:
        network: its trained parameters are those with requires_grad.
        loss: (outputs, targets) -> (samples,), each from its own sample alone.
        batch: the drawn patients' samples; None where nobody was drawn.
        patients: (samples,), an integer for each patient; empty where nobody was drawn.
        plan: private and built; gives clip norm, noise multiplier, rate and declared patients.
        noise: fresh for each step; a seeded one gives no privacy.
        method: as in `clipped_sum`.
        samples_at_once: likewise.

    Returns:
        by trained parameter, float64, on the parameter's device.

    Raises:
        PlanError: the plan has no guarantee, or was not built.
    """
    parts: list[Part] = [] if batch is None else [(batch, patients)]
    total = clipped_total(
        network, loss, parts, plan, method=method, samples_at_once=samples_at_once
    )
    return private_mean(total, plan, noise)


def clipped_total(
    network: nn.Module,
    loss: Loss,
    parts: Iterable[Part],
    plan: StudyPlan,
    *,
    method: Method = "stored",
    samples_at_once: int | None = None,
) -> ClippedSum:
    """The clipped sum over parts of a draw, all samples of a patient in one part. Not private.

    Raises:
        ValueError: a patient's samples lie in two parts.
    """
    promise = promise_of(plan)
    total: ClippedSum | None = None
    for batch, patients in parts:
        part = clipped_sum(
            network,
            loss,
            batch,
            patients,
            promise.clip_norm,
            clipping=promise.clipping,
            method=method,
            samples_at_once=samples_at_once,
        )
        total = part if total is None else merge([total, part])
    return zero_sum(network) if total is None else total


def private_mean(total: ClippedSum, plan: StudyPlan, noise: Noise) -> dict[str, Tensor]:
    """A clipped sum with its noise, over rate * expected_patients; float64.

    Raises:
        PlanError: the plan has no guarantee, or was not built.
    """
    promise = promise_of(plan)
    sigma = plan.noise.training * promise.clip_norm
    found = {}
    for name, part in total.sum.items():
        added = torch.from_numpy(noise.gaussian(tuple(part.shape), sigma)).to(part.device)
        found[name] = (part.double() + added) / (promise.rate * promise.expected_patients)
    return found


def promise_of(plan: StudyPlan) -> LocalPrivacy:
    """The guarantee of a plan that has one.

    Raises:
        PlanError: it has none.
    """
    if plan.private is None:
        raise PlanError("the plan has no guarantee: train it as a plan without one")
    return plan.private


def prepare(network: nn.Module, plan: StudyPlan, memory_bytes: int = MEMORY_BYTES) -> Schedule:
    """Find out how this network's per-patient gradients are made; once a trainer, without data.

    What is trained of the network must be settled. Its weights are left alone.

    Args:
        plan: private.
        memory_bytes: for activations and per-patient gradients.

    Returns:
        Method and micro-batch, which depend on no weight and no patient: they hold for every round.

    Raises:
        PlanError: the plan has no guarantee; the network mixes patients, keeps statistics or other
            state of what it sees, or needs more memory.
    """
    promise_of(plan)
    device = next(network.parameters()).device
    chance = torch.Generator().manual_seed(0)
    shape = tuple(plan.task.patch_size)
    images = torch.randn(3, len(plan.task.channels), *shape, generator=chance).to(device)
    labels = torch.randint(len(plan.task.labels) + 1, (3, *shape), generator=chance).to(device)
    mode = network.training
    network.train()
    try:
        found = examine(network, dice_ce_per_patient, (images, labels), torch.tensor([0, 0, 1]))
        return _schedule(network, plan, found, memory_bytes, device)
    finally:
        network.train(mode)


def train_round_privately(
    network: nn.Module,
    patients: Patients,
    plan: StudyPlan,
    *,
    round_: int,
    site: str,
    noise: Noise,
    how: Schedule,
    annotated: Sequence[str] | None = None,
    optimiser_state: Arrays | None = None,
    anchor: Arrays | None = None,
) -> RoundOutcome:
    """Train a network in place for `plan.training.steps_per_round` private steps.

    What comes out of the network is (epsilon, delta)-private over the plan's schedule, for a source
    of noise that is private; `loss` and `lost` of the outcome are not, and stay at the hospital.

    Args:
        network: holds the round's model; parameters without requires_grad stay as they are.
        patients: prepared, labelled cases by patient, loaded when asked. Whoever cannot be read
            contributes zero.
        plan: private and built.
        round_: from 1; places the round in the learning-rate schedule.
        site: its name, for the seeds of patches.
        noise: who is drawn, noise and dropout; fresh for this round.
        how: from `prepare`, for this network and plan.
        annotated: names of the labels that the site's patients are annotated with, all alike: a
            declared property of the site, never of one patient. None is all of the plan's.
        optimiser_state: of the last round at this site; None begins anew.
        anchor: the round's model as arrays, for fedprox; its pull is added after the noise.

    Raises:
        PlanError: the plan has no guarantee.
        NotFiniteError: the weights are not finite after the last step; that follows from noisy
            gradients alone.
        RoundError: the optimiser's state does not fit.
        ValueError: fedprox without an anchor, or a state although the plan resets it.
    """
    settings, promise = plan.training, promise_of(plan)
    require_fitting_state(plan, optimiser_state, anchor)
    device = next(network.parameters()).device
    optimiser = build_optimiser(network, settings.optimiser)
    if optimiser_state:
        restore_optimiser(network, optimiser, optimiser_state)
    names, patches = sorted(patients), _Patches(patients, plan, site, device)
    losses, lost = _Losses(annotated_rows([annotated], plan.task.labels)), 0
    network.train()
    with repeatable(settings.threads, int.from_bytes(noise.bytes(8)) >> 1, device):
        for step in range(settings.steps_per_round):
            drawn = np.flatnonzero(noise.chosen(len(names), promise.rate)).tolist()
            place = f"{round_} {step}"
            with _autocast(plan, device):
                total = clipped_total(
                    network,
                    losses,
                    patches.parts([(i, names[i]) for i in drawn], place, how.samples_at_once),
                    plan,
                    method=how.method,
                    samples_at_once=how.samples_at_once,
                )
            lost += len(drawn) - int(total.norms.isfinite().sum())
            _follow(network, private_mean(total, plan, noise), plan, anchor)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(plan, round_, step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    if not all(bool(torch.isfinite(p).all()) for p in network.state_dict().values()):
        raise NotFiniteError(
            f"private training gave weights that are not finite (round {round_}): lower "
            "training.optimiser.learning_rate in the plan"
        )
    state = optimiser_arrays(network, optimiser) if settings.optimiser.state == "keep" else {}
    return RoundOutcome(settings.steps_per_round, losses.mean, state, lost)


class _Patches:
    """The samples that drawn patients bring; each patient's depend on nobody else."""

    def __init__(
        self, patients: Patients, plan: StudyPlan, site: str, device: torch.device
    ) -> None:
        task, settings = plan.task, plan.training
        self._plan, self._site, self._device = plan, site, device
        self._margin = margin_of(task.patch_size, task.spacing_mm, settings.augmentation)
        self._sampler = PatchSampler(
            patients,
            window(task.patch_size, 1),
            window(self._margin, 0),
            settings.foreground_share,
        )

    def parts(self, drawn: Sequence[tuple[int, str]], place: str, limit: int) -> Iterator[Part]:
        """The draw in parts of about `limit` samples, each patient whole; unreadable ones left out.

        Args:
            drawn: number and name of each patient.
            place: round and step.
            limit: of samples in memory at once, beyond it only where one patient has more.
        """
        images: list[Tensor] = []
        labels: list[Tensor] = []
        numbers: list[int] = []
        for number, name in drawn:
            found = self._of(name, place)
            if found is None:
                continue
            if numbers and len(numbers) + len(found[0]) > limit:
                yield self._part(images, labels, numbers)
                images, labels, numbers = [], [], []
            images.append(found[0])
            labels.append(found[1])
            numbers += [number] * len(found[0])
        if numbers:
            yield self._part(images, labels, numbers)

    def _of(self, name: str, place: str) -> Batch | None:
        """One patient's patches that can be read, or None; whatever goes wrong with one is its own.

        What goes wrong is not even logged here: a log may travel further than a patient's data.
        """
        chance = seed_for(self._plan.training.seed, self._site, 0, f"patches {place} {name}")
        rng = np.random.default_rng(chance)
        found = []
        for _ in range(promise_of(self._plan).patches_per_patient):
            try:
                found.append(self._one(name, rng))
            except Exception:
                continue
        good = [batch for batch in found if self._usable(batch)]
        if not good:
            return None
        return torch.cat([image for image, _ in good]), torch.cat([label for _, label in good])

    def _one(self, name: str, rng: np.random.Generator) -> Batch:
        """One augmented patch of one patient: images (1, C, *patch) and labels (1, *patch)."""
        task = self._plan.task
        image, label = self._sampler.draw(name, rng)
        images = torch.from_numpy(image[None]).to(self._device)
        labels = torch.from_numpy(label[None]).to(self._device)
        if task.dimensions == 2:
            images, labels = images.squeeze(-1), labels.squeeze(-1)
        return augment(
            images,
            labels,
            margin=self._margin,
            spacing_mm=task.spacing_mm,
            settings=self._plan.training.augmentation,
            rng=rng,
        )

    def _usable(self, batch: Batch) -> bool:
        """Whether a sample is what the network and the loss take: neither may raise for one."""
        image, label = batch
        task = self._plan.task
        shape = (len(task.channels), *task.patch_size)
        return (
            image.shape == (1, *shape)
            and image.dtype == torch.float32
            and label.shape == (1, *task.patch_size)
            and bool(image.isfinite().all())
            and bool(((label >= 0) & (label <= len(task.labels))).all())
        )

    @staticmethod
    def _part(images: Sequence[Tensor], labels: Sequence[Tensor], numbers: list[int]) -> Part:
        """What `clipped_sum` takes."""
        return (torch.cat(list(images)), torch.cat(list(labels))), torch.tensor(numbers)


class _Losses:
    """The loss, and the mean of what it was, for the hospital's own eyes.

    Args:
        annotated: (1, labels), as the loss takes it, the same for every sample.
    """

    def __init__(self, annotated: Tensor | None) -> None:
        self._annotated = annotated
        self._sum, self._count = 0.0, 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(samples,)."""
        annotated = self._annotated
        if annotated is not None:
            annotated = annotated.to(outputs.device).expand(len(outputs), -1)
        losses = dice_ce_per_patient(outputs, targets, annotated)
        finite = losses.detach()[losses.isfinite()]
        self._sum += float(finite.double().sum())
        self._count += len(finite)
        return losses

    @property
    def mean(self) -> float | None:
        """Over all samples of the round; None where there was none."""
        return self._sum / self._count if self._count else None


def _follow(
    network: nn.Module, gradient: dict[str, Tensor], plan: StudyPlan, anchor: Arrays | None
) -> None:
    """Give the optimiser a private gradient, with fedprox's pull, which is post-processing."""
    prox = plan.aggregation.proximal_mu if plan.aggregation.strategy == "fedprox" else 0.0
    for name, parameter in trained(network).items():
        found = gradient[name]
        if prox and anchor is not None:
            begun = torch.tensor(anchor[name], device=parameter.device)
            found = found + prox * (parameter.detach() - begun).double()
        parameter.grad = found.to(parameter.dtype)


def _schedule(
    network: nn.Module,
    plan: StudyPlan,
    found: Examination,
    memory_bytes: int,
    device: torch.device,
) -> Schedule:
    """Method and micro-batch, chosen from an example that is nobody's."""
    shape = tuple(plan.task.patch_size)
    image = torch.zeros(1, len(plan.task.channels), *shape, device=device)
    label = torch.zeros(1, *shape, dtype=torch.long, device=device)
    samples = promise_of(plan).patches_per_patient
    with _autocast(plan, device):
        chosen = choose(network, dice_ce_per_patient, (image, label), memory_bytes, samples)
    return replace(chosen, method="loop") if found.method == "loop" else chosen


def _autocast(plan: StudyPlan, device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 where plan and device have it; float16 would need a scale that follows the data."""
    if plan.training.mixed_precision and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
