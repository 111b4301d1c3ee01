"""What every site does between two aggregates: the plan's section `training`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedseg.frozen import Count, Fraction, Frozen, NotNegative, Positive

Trainable = Literal[
    "all", "norms", "head", "norms+head",
    "adapters", "norms+adapters", "adapters+head", "norms+adapters+head",
]  # fmt: skip


class Optimiser(Frozen):
    """Each site's own optimiser. `state: keep` stores its moments at the site, round by round."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 1e-5
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    state: Literal["keep", "reset"] = "keep"


class Schedule(Frozen):
    """Learning rate over the whole study, as a share of `optimiser.learning_rate`."""

    name: Literal["constant", "cosine"] = "cosine"
    warmup_rounds: NotNegative = 1


class Augmentation(Frozen):
    """Random changes of a training patch; zero or an empty list switches each one off."""

    flip_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = ()
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    scaling: Annotated[float, Field(ge=0, lt=1)] = 0.0
    noise: NotNegative = 0.0
    brightness: NotNegative = 0.0
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Training(Frozen):
    """What every site does in one round. Dice + cross-entropy, averaged per patient.

    `trainable` leaves the rest of the network as the study found it: `norms` are the affine
    parameters of norm layers, `head` is the last layer, `adapters` those of `model.adapters`. Under
    a guarantee the rate says who is in a step: `batch_size` has no meaning there.
    """

    loss: Literal["dice_ce"] = "dice_ce"
    optimiser: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    steps_per_round: Count = 20
    batch_size: Count = 2
    foreground_share: Fraction = 0.5
    gradient_clip_norm: Positive | None = 12.0
    augmentation: Augmentation = Augmentation()
    trainable: Trainable = "all"
    mixed_precision: bool = True
    threads: Count = 1
    seed: int = Field(default=0, ge=0, lt=2**63)
