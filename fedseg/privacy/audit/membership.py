"""Membership inference on real patients: could somebody tell whose images trained a model?

LiRA (Carlini et al., S&P 2022): many models are trained, each on a random half of the patients, and
each patient is in half of the models. Every model is attacked in turn, the others being the
shadows: how likely is its loss on a patient's images where models with that patient are like the
shadows with, against those without. The area under the curve (AUC) of that ratio is 0.5 where
nothing can be told.

The control is the same attack on a lie: among the models that all have the patient, a random half
is said not to. Whatever it finds comes from the attack itself, small numbers above all, so that
only the difference to the control counts. Intervals are over patients. All of this describes
members: it is for the hospital's own eyes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedseg.arrays import Arrays, seed_for
from fedseg.errors import DataError
from fedseg.evaluation.statistics import MeanWithInterval, mean_with_interval, paired_difference
from fedseg.imaging.transforms import PreparedCase
from fedseg.learning.local import train_round
from fedseg.learning.losses import dice_ce_per_patient
from fedseg.learning.private import prepare, train_round_privately
from fedseg.learning.repeatable import repeatable
from fedseg.learning.sampling import PatchSampler, Patients, window
from fedseg.models.parts import freeze
from fedseg.models.zoo import build_network, load_tensors
from fedseg.plan import StudyPlan
from fedseg.privacy.audit.bounds import Flags, Floats
from fedseg.privacy.noise import Noise

LEAST_MODELS = 8  # the control divides half of them once more
LEAST_PATIENTS = 4
PATCHES = 8  # of a patient, that a model is judged by
LOWEST_SPREAD = 1e-6


@dataclass(frozen=True)
class Membership:
    """What the attack found.

    Attributes:
        attack: AUC over patients, with its 95 % interval.
        control: likewise for members against members.
        difference: attack less control, paired by patient.
        hit_rate: share of members found where one in ten non-members is falsely accused.
        patients: how many were attacked.
        models: how many were trained.
    """

    attack: MeanWithInterval
    control: MeanWithInterval
    difference: MeanWithInterval
    hit_rate: float
    patients: int
    models: int

    @property
    def leaks(self) -> bool:
        """Whether members are told apart better than chance and control explain."""
        low = self.difference[1]
        return low is not None and low > 0

    @property
    def text(self) -> str:
        """In plain words."""
        said = "members can be told apart" if self.leaks else "no sign that members can be told"
        return (
            f"Membership inference on {self.patients} patients, {self.models} models: AUC "
            f"{_interval(self.attack)}, control {_interval(self.control)}, difference "
            f"{_interval(self.difference)}; {self.hit_rate:.0%} of members found where 10 % of "
            f"others are accused: {said}. About members: keep it at the hospital."
        )


def membership(
    plan: StudyPlan,
    initial: Arrays,
    patients: Patients,
    *,
    models: int,
    seed: int,
    progress: Callable[[str], None] = lambda _model: None,
) -> Membership:
    """Train models on halves of the patients, as the plan says, and attack each.

    Args:
        plan: private or not; each model is a federation of one hospital over all its rounds.
        initial: what each model starts from.
        patients: prepared, labelled cases by patient.
        models: at least 8, a multiple of 4.
        seed: decides who is in which model, and all noise.
        progress: is told when a model is trained.

    Raises:
        DataError: fewer than 4 patients.
        ValueError: too few models.
    """
    if models < LEAST_MODELS or models % 4:
        raise ValueError(f"expected at least {LEAST_MODELS} models, a multiple of 4, not {models}")
    if len(patients) < LEAST_PATIENTS:
        raise DataError(
            f"membership inference needs at least {LEAST_PATIENTS} patients, came {len(patients)}"
        )
    names = sorted(patients)
    rng = np.random.default_rng(seed)
    members = _halves(len(names), models, rng)
    while not members.any(1).all():  # nobody trains on nobody
        members = _halves(len(names), models, rng)
    confidence = np.empty(members.shape)
    for number, own in enumerate(members):
        chosen = {name: patients[name] for name, inside in zip(names, own, strict=True) if inside}
        network = _trained(plan, initial, chosen, Noise.seeded(seed, f"shadow {number}"))
        confidence[number] = [_confidence(network, plan, patients, name) for name in names]
        progress("model")
    return attacked(confidence, members, seed)


def attacked(confidence: Floats, members: Flags, seed: int) -> Membership:
    """LiRA and its control.

    Args:
        confidence: (models, patients), of each model in the labels of each patient, any scale on
            which it is about normal.
        members: (models, patients), half of the models for each patient.
        seed: of the control's lie.
    """
    models, count = members.shape
    attack = [_auc(confidence[:, i], members[:, i]) for i in range(count)]
    rng, control = np.random.default_rng(seed), []
    for i in range(count):
        inside = confidence[members[:, i], i]
        control.append(_auc(inside, _halves(1, len(inside), rng)[:, 0]))
    scores = np.stack([_ratios(confidence[:, i], members[:, i]) for i in range(count)], 1)
    limit = np.quantile(scores[~members], 0.9)
    return Membership(
        mean_with_interval(attack, seed=seed),
        mean_with_interval(control, seed=seed),
        paired_difference(attack, control, seed=seed),
        float((scores[members] > limit).mean()),
        count,
        models,
    )


def _interval(found: MeanWithInterval) -> str:
    """A mean with its 95 % interval."""
    mean, low, high = found
    return f"{mean:.3f}" if low is None else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _halves(patients: int, models: int, rng: np.random.Generator) -> Flags:
    """(models, patients): each patient is in half of the models, by chance."""
    half = np.arange(models) < models // 2
    return np.stack([rng.permutation(half) for _ in range(patients)], 1)


def _ratios(confidence: Floats, members: Flags) -> Floats:
    """Log likelihood ratio of membership for each model, the others being its shadows.

    A model's own group lacks it, which makes the ratio err to the side of "no member".
    """
    found = np.empty(len(confidence))
    for target in range(len(confidence)):
        others = np.arange(len(confidence)) != target
        inside, outside = confidence[others & members], confidence[others & ~members]
        rest = np.concatenate([inside - inside.mean(), outside - outside.mean()])
        spread = max(float(np.sqrt(np.mean(rest**2))), LOWEST_SPREAD)
        own = confidence[target]
        apart = (own - outside.mean()) ** 2 - (own - inside.mean()) ** 2
        found[target] = apart / (2 * spread**2)
    return found


def _auc(confidence: Floats, members: Flags) -> float:
    """How often the ratio is larger for a model with the patient than for one without.

    Both models of a pair are left out of the shadows that judge them, so that they are exchangeable
    where nothing leaks and the mean is 0.5 exactly, however few models there are. With one spread
    for both groups the ratio is linear, and the order is that of (with - without) * confidence.
    """
    inside, outside = confidence[members], confidence[~members]
    rest_in = (inside.sum() - inside) / (len(inside) - 1)
    rest_out = (outside.sum() - outside) / (len(outside) - 1)
    order = (rest_in[:, None] - rest_out) * (inside[:, None] - outside)
    return float(np.mean((order > 0) + 0.5 * (order == 0)))


def _trained(
    plan: StudyPlan, initial: Arrays, patients: Mapping[str, Sequence[PreparedCase]], noise: Noise
) -> nn.Module:
    """A model after all rounds of a hospital by itself."""
    network = build_network(plan.model, plan.task)
    freeze(network, plan.training.trainable)
    load_tensors(network, initial)
    how = prepare(network, plan) if plan.private else None
    state: Arrays = {}
    for round_ in range(1, plan.aggregation.rounds + 1):
        anchor = {name: t.detach().numpy().copy() for name, t in network.state_dict().items()}
        if how is not None:
            outcome = train_round_privately(
                network, patients, plan, round_=round_, site="audit", noise=noise,
                how=how, optimiser_state=state or None, anchor=anchor,
            )  # fmt: skip
        else:
            outcome = train_round(
                network, patients, plan, round_=round_, site="audit",
                optimiser_state=state or None, anchor=anchor,
            )  # fmt: skip
        state = outcome.optimiser_state
    return network.eval()


def _confidence(network: nn.Module, plan: StudyPlan, patients: Patients, name: str) -> float:
    """Log odds of exp(-loss), the mean loss over patches that are the same for every model."""
    task = plan.task
    sampler = PatchSampler(patients, window(task.patch_size, 1), (0, 0, 0), 1.0)
    rng = np.random.default_rng(seed_for(plan.training.seed, "", 0, f"audit patches {name}"))
    drawn = [sampler.draw(name, rng) for _ in range(PATCHES)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn]))
    labels = torch.from_numpy(np.stack([label for _, label in drawn])).long()
    if task.dimensions == 2:
        images, labels = images.squeeze(-1), labels.squeeze(-1)
    with torch.no_grad(), repeatable(plan.training.threads, 0, images.device):
        loss = float(dice_ce_per_patient(network(images), labels).mean())
    return _log_odds(loss)


def _log_odds(loss: float) -> float:
    """log(p / (1 - p)) for p = exp(-loss), which is nearly normal over models."""
    return float(-np.log(np.expm1(np.clip(loss, 1e-9, 500.0))))
