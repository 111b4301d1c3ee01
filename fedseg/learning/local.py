"""One round of training at one site.

A step draws a batch of patients, one patch each, and follows the mean of their losses. Everything
random comes from (plan seed, site, round, purpose): equal rounds give equal bits on CPU, at one
thread, whatever ran before in the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedseg.arrays import Arrays, seed_for
from fedseg.errors import DataError, NotFiniteError
from fedseg.learning.augment import augment, margin_of
from fedseg.learning.losses import annotated_rows, dice_ce_per_patient
from fedseg.learning.optimiser import (
    build_optimiser,
    optimiser_arrays,
    restore_optimiser,
    trained,
)
from fedseg.learning.repeatable import repeatable
from fedseg.learning.sampling import PatchSampler, Patients, draw_patients, window
from fedseg.plan import StudyPlan
from fedseg.rates import learning_rate

Batch = tuple[Tensor, Tensor, Tensor | None]  # images, labels, what each is annotated with


@dataclass(frozen=True)
class RoundOutcome:
    """What a round of training gave besides the network, which was trained in place.

    Attributes:
        steps: of the optimiser.
        loss: mean over the steps of the mean over the batch; Dice + cross-entropy, at least 0.
            None where a private round drew nobody.
        optimiser_state: what the next round at this site continues from; it stays there. Empty
            where the plan says `state: reset`.
        lost: how often a patient was drawn and contributed zero in a private round, since nothing
            could be read or the gradient was not finite. It never leaves.
    """

    steps: int
    loss: float | None
    optimiser_state: dict[str, NDArray[np.generic]]
    lost: int = 0


def train_round(
    network: nn.Module,
    patients: Patients,
    plan: StudyPlan,
    *,
    round_: int,
    site: str,
    optimiser_state: Arrays | None = None,
    anchor: Arrays | None = None,
    shift: Arrays | None = None,
) -> RoundOutcome:
    """Train a network in place for `plan.training.steps_per_round` steps, on its own device.

    Args:
        network: holds the round's model.
        patients: prepared, labelled cases by patient; a sequence may load its cases when asked.
        plan: task, training and aggregation settings.
        round_: from 1; places the round in the learning-rate schedule.
        site: its name, for the seeds.
        optimiser_state: of the last round at this site; None begins anew.
        anchor: the round's model as arrays, for fedprox (Li et al., MLSys 2020).
        shift: added to every gradient by name, for scaffold (Karimireddy et al., ICML 2020).

    Raises:
        DataError: no patient, a patient without cases, or a case without labels.
        NotFiniteError: loss, gradient or weights are not finite.
        RoundError: the optimiser's state does not fit.
        ValueError: fedprox without an anchor, or a state although the plan resets it.
    """
    settings = plan.training
    _check(patients, plan, optimiser_state, anchor)
    device = next(network.parameters()).device
    optimiser = build_optimiser(network, settings.optimiser)
    if optimiser_state:
        restore_optimiser(network, optimiser, optimiser_state)
    step_of = _Stepper(network, optimiser, plan, anchor if _proximal(plan) else None, shift)
    losses = []
    network.train()
    with repeatable(settings.threads, seed_for(settings.seed, site, round_, "network"), device):
        for step, batch in enumerate(_batches(patients, plan, round_, site, device)):
            losses.append(step_of(batch, learning_rate(plan, round_, step)))
            if not np.isfinite(losses[-1]):
                raise _not_finite("loss or gradient", round_, step)
    if not all(bool(torch.isfinite(p).all()) for p in network.state_dict().values()):
        raise _not_finite("weights", round_, len(losses))
    keep = settings.optimiser.state == "keep"
    state = optimiser_arrays(network, optimiser) if keep else {}
    return RoundOutcome(len(losses), float(np.mean(losses)), state)


class _Stepper:
    """One step of the optimiser after another; holds the gradient scaler and the anchor."""

    def __init__(
        self,
        network: nn.Module,
        optimiser: torch.optim.Optimizer,
        plan: StudyPlan,
        anchor: Arrays | None,
        shift: Arrays | None,
    ) -> None:
        self._network = network
        self._optimiser = optimiser
        self._plan = plan
        self._parameters = trained(network)
        device = next(network.parameters()).device
        self._mixed = plan.training.mixed_precision and device.type == "cuda"
        self._type = torch.float16
        if self._mixed and torch.cuda.is_bf16_supported():
            self._type = torch.bfloat16
        scale = self._mixed and self._type == torch.float16
        self._scaler = torch.amp.GradScaler(device.type, enabled=scale)
        self._anchor, self._shift = (
            {
                name: torch.tensor(array, device=device)
                for name, array in (arrays or {}).items()
                if name in self._parameters
            }
            for arrays in (anchor, shift)
        )

    def __call__(self, batch: Batch, rate: float) -> float:
        """Take one step; returns the mean loss, or NaN where loss or gradient is not finite."""
        images, labels, annotated = batch
        self._optimiser.zero_grad(set_to_none=True)
        with self._autocast(images.device.type):
            logits = self._network(images)
        loss = dice_ce_per_patient(logits, labels, annotated).mean()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.unscale_(self._optimiser)
        self._pull_to_anchor()
        limit = self._plan.training.gradient_clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), limit)
        self._shift_gradients()
        if not (torch.isfinite(loss) and (torch.isfinite(norm) or self._scaler.is_enabled())):
            return float("nan")
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._scaler.step(self._optimiser)
        self._scaler.update()
        return float(loss.detach())

    def _autocast(self, device: str) -> AbstractContextManager[None]:
        """Mixed precision where it is on."""
        return torch.autocast(device, self._type, enabled=self._mixed)

    def _pull_to_anchor(self) -> None:
        """Add the gradient of mu / 2 * ||w - anchor||^2 (FedProx)."""
        for name, anchor in self._anchor.items():
            parameter = self._parameters[name]
            if parameter.grad is not None:
                pull = parameter.detach() - anchor
                parameter.grad.add_(pull, alpha=self._plan.aggregation.proximal_mu)

    def _shift_gradients(self) -> None:
        """Correct each gradient by what the site's usually lacks of all sites' (SCAFFOLD)."""
        for name, shift in self._shift.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                gradient.add_(shift)


def _batches(
    patients: Patients, plan: StudyPlan, round_: int, site: str, device: torch.device
) -> Iterable[Batch]:
    """The round's batches, augmented, on the network's device."""
    task, settings = plan.task, plan.training
    margin = margin_of(task.patch_size, task.spacing_mm, settings.augmentation)
    sampler = PatchSampler(
        patients, window(task.patch_size, 1), window(margin, 0), settings.foreground_share
    )
    rng = np.random.default_rng(seed_for(settings.seed, site, round_, "patches"))
    count = settings.steps_per_round * settings.batch_size
    turns = draw_patients(
        list(patients), first=(round_ - 1) * count, count=count, seed=settings.seed, site=site
    )
    for first in range(0, count, settings.batch_size):
        drawn = [sampler.patch(name, rng) for name in turns[first : first + settings.batch_size]]
        images = torch.from_numpy(np.stack([patch.image for patch in drawn])).to(device)
        labels = torch.from_numpy(np.stack([patch.label for patch in drawn])).to(device)
        annotated = annotated_rows([patch.annotated for patch in drawn], task.labels)
        if task.dimensions == 2:
            images, labels = images.squeeze(-1), labels.squeeze(-1)
        images, labels = augment(
            images,
            labels,
            margin=margin,
            spacing_mm=task.spacing_mm,
            settings=settings.augmentation,
            rng=rng,
        )
        yield images, labels, None if annotated is None else annotated.to(device)


def _proximal(plan: StudyPlan) -> bool:
    """True where the loss is pulled towards the round's model."""
    return plan.aggregation.strategy == "fedprox"


def _check(
    patients: Patients, plan: StudyPlan, optimiser_state: Arrays | None, anchor: Arrays | None
) -> None:
    """Refuse what cannot be trained on or with."""
    if not patients or not all(len(cases) for cases in patients.values()):
        raise DataError(
            "training needs at least one patient, and a usable case of each: see what the check "
            "of the data says about the train split"
        )
    require_fitting_state(plan, optimiser_state, anchor)


def require_fitting_state(
    plan: StudyPlan, optimiser_state: Arrays | None, anchor: Arrays | None
) -> None:
    """Refuse to start a round without what the plan's strategy needs, or with what it forbids.

    Raises:
        ValueError: fedprox without an anchor, or a state although the plan resets it.
    """
    if _proximal(plan) and anchor is None:
        raise ValueError("fedprox needs the round's model as anchor")
    if optimiser_state and plan.training.optimiser.state == "reset":
        raise ValueError("the plan resets the optimiser each round, but a state was given")


def _not_finite(what: str, round_: int, step: int) -> NotFiniteError:
    """Training ran away."""
    return NotFiniteError(
        f"training gave numbers that are not finite ({what}, round {round_}, step {step}): look "
        "for extreme intensities in the data, or lower training.optimiser.learning_rate or "
        "training.gradient_clip_norm in the plan"
    )
