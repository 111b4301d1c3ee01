"""The study plan: what a consortium proposes and every hospital approves.

The plan is data. It is read once from YAML, checked field by field and across fields, and frozen.
Its canonical bytes (UTF-8 JSON, sorted keys, no spaces) give its digest; two plans with the same
digest ask for the same study. Nothing here needs torch: the coordinator reads plans too.
"""

from __future__ import annotations

import hashlib
import json
import re
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    FiniteFloat,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from fedseg.errors import PlanError
from fedseg.frozen import Count, Digest, Fraction, Frozen, Name, NotNegative, Positive
from fedseg.promise import Calibration, LocalPrivacy, NoPrivacy, Privacy
from fedseg.strategy import Aggregation
from fedseg.strictyaml import read_mapping

Modality = Literal["MR", "CT"]
Metric = Literal["dice", "hd95", "nsd"]
Trainable = Literal[
    "all", "norms", "head", "norms+head",
    "adapters", "norms+adapters", "adapters+head", "norms+adapters+head",
]  # fmt: skip


class Channel(Frozen):
    """One input channel of a case, in order, for example T1w and FLAIR."""

    name: str = Field(min_length=1, max_length=32)
    modality: Modality


class RobustZScore(Frozen):
    """MR: clip each volume at two percentiles, then subtract its mean and divide by its spread."""

    percentiles: tuple[Annotated[float, Field(ge=0, lt=50)], Annotated[float, Field(gt=50, le=100)]]


class HuWindow(Frozen):
    """CT: clip to a window in Hounsfield units and map it to [-1, 1]."""

    window_hu: tuple[FiniteFloat, FiniteFloat]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError(f"the lower end must be below the upper end, not {self.window_hu}")
        return self


class Normalisation(Frozen):
    """How the intensities of each modality become comparable between hospitals."""

    MR: RobustZScore = RobustZScore(percentiles=(0.5, 99.5))
    CT: HuWindow | None = None


class Task(Frozen):
    """What is segmented, in which images.

    A 2-D task cuts volumes into slices along the third image axis; spacing and patch are in-plane.
    """

    dimensions: Literal[2, 3]
    channels: tuple[Channel, ...] = Field(min_length=1, max_length=8)
    labels: dict[str, int] = Field(min_length=1, max_length=255)
    spacing_mm: tuple[Positive, ...]
    patch_size: tuple[Count, ...]
    normalisation: Normalisation = Normalisation()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for field in ("spacing_mm", "patch_size"):
            if len(getattr(self, field)) != self.dimensions:
                raise ValueError(
                    f"{field} needs {self.dimensions} numbers for a {self.dimensions}-D task, "
                    f"not {len(getattr(self, field))}"
                )
        if sorted(self.labels.values()) != list(range(1, len(self.labels) + 1)):
            raise ValueError(
                "labels must be numbered 1, 2, 3, ... (0 is the background); map other values "
                "at the site, in its manifest"
            )
        if any(c.modality == "CT" for c in self.channels) and self.normalisation.CT is None:
            raise ValueError(
                "normalisation.CT.window_hu is missing: a CT channel needs a window in HU, "
                "for example [-160, 240] for soft tissue"
            )
        return self


class UNetOptions(Frozen):
    """The MONAI U-Net: residual units, strided convolutions, norms without running statistics."""

    channels: tuple[Count, ...] = Field(default=(16, 32, 64, 128), min_length=2, max_length=8)
    residual_units: int = Field(default=2, ge=0, le=4)
    norm: Literal["instance", "group"] = "instance"
    groups: Count = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @field_validator("norm", mode="before")
    @classmethod
    def _no_batch_norm(cls, norm: object) -> object:
        if isinstance(norm, str) and norm.lower().replace("_", "").startswith("batch"):
            raise ValueError(
                "batch norm mixes patients and keeps running statistics: no per-patient gradient "
                "exists and the statistics would leave the hospital; use instance or group"
            )
        return norm

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        bad = [c for c in self.channels if self.norm == "group" and c % self.groups]
        if bad:
            raise ValueError(f"groups={self.groups} does not divide the channels {bad}")
        return self


class Adapters(Frozen):
    """A low-rank update beside the frozen weight of each large layer (Hu et al., ICLR 2022).

    `down: frozen` trains the second factor alone: far fewer numbers, a mean over sites that
    is exact, and no product of two noises (Sun et al., ICLR 2024, arXiv 2403.12313).
    """

    rank: Annotated[int, Field(ge=1, le=256)] = 4
    down: Literal["trained", "frozen"] = "trained"


class Model(Frozen):
    """The network by name and version; `unet` is built in, others come by entry point."""

    network: Name = "unet"
    version: str = "1"
    options: dict[str, JsonValue] = {}
    adapters: Adapters | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without adapters the bytes, and so the digest, are those of plans that knew of none."""
        value: dict[str, Any] = handler(self)
        if self.adapters is None:
            value.pop("adapters", None)
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.network == "unet":
            if self.version != "1":
                raise ValueError(f"version: unet has version 1 here, not {self.version!r}")
            options = UNetOptions.model_validate(self.options).model_dump(mode="json")
            object.__setattr__(self, "options", options)
        elif not _is_json(self.options):
            raise ValueError("options: numbers must be finite, NaN and infinity have no JSON")
        return self


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


class Evaluation(Frozen):
    """What is measured on each site's `val` patients, and how often."""

    metrics: tuple[Metric, ...] = ("dice", "hd95", "nsd")
    every_rounds: Count = 5
    tolerance_mm: Positive = 1.0
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5

    @model_validator(mode="after")
    def _has_dice(self) -> Self:
        if "dice" not in self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise ValueError("metrics must name dice, and each metric once")
        return self


class TensorSpec(Frozen):
    """Name, shape and dtype of one tensor of the model."""

    name: str = Field(min_length=1, max_length=256)
    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(max_length=8)
    dtype: Literal["float32", "float64", "float16", "int64", "uint8"]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        width = {"float32": 4, "float64": 8, "float16": 2, "int64": 8, "uint8": 1}
        return width[self.dtype] * prod(self.shape)


class InitialModel(Frozen):
    """The model that the study starts from, by digest, and the schema that every update keeps.

    Attributes:
        personal: tensors that each site trains for itself; they never travel.
        frozen: tensors that nobody trains, so that no update carries them.
    """

    digest: Digest
    tensors: tuple[TensorSpec, ...] = Field(min_length=1)
    personal: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _parts_are_there(self) -> Self:
        apart = [*self.personal, *self.frozen]
        if len(set(apart)) != len(apart) or not set(apart) <= {t.name for t in self.tensors}:
            raise ValueError(
                "personal and frozen name other tensors than the model's, or one twice: run "
                "`fedseg plan build` again"
            )
        if len(apart) == len(self.tensors):
            raise ValueError("nothing is shared: every tensor is personal or frozen")
        return self

    @property
    def update_nbytes(self) -> int:
        """Size of one update in bytes, without the header of its file."""
        return sum(spec.nbytes for spec in self.updated)

    @property
    def updated(self) -> tuple[TensorSpec, ...]:
        """The tensors that an update carries."""
        apart = {*self.personal, *self.frozen}
        return tuple(spec for spec in self.tensors if spec.name not in apart)

    @property
    def nbytes(self) -> int:
        """Size of one model in bytes, without the header of its file."""
        return sum(t.nbytes for t in self.tensors)


class StudyPlan(Frozen):
    """Everything that the sites of a study agree on before it begins."""

    format: Literal["fedseg-plan/1"] = "fedseg-plan/1"
    study: Name
    task: Task
    model: Model = Model()
    training: Training = Training()
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation = Evaluation()
    privacy: Privacy = NoPrivacy()
    initial: InitialModel | None = None
    calibrated: Calibration | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if any(a >= self.task.dimensions for a in self.training.augmentation.flip_axes):
            raise ValueError("training.augmentation.flip_axes names an axis the task does not have")
        if self.training.schedule.warmup_rounds >= self.aggregation.rounds:
            raise ValueError(
                "training.schedule.warmup_rounds must be below aggregation.rounds "
                f"({self.aggregation.rounds})"
            )
        if isinstance(self.privacy, LocalPrivacy):
            self._keeps(self.privacy)
        elif self.aggregation.weighting == "patients" and self.privacy.outputs.counts != "plain":
            raise ValueError(
                "aggregation.weighting: patients needs privacy.outputs.counts: plain; or say "
                "weighting: uniform"
            )
        self._strategy_fits()
        if self.model.network != "unet":
            return self
        step = 2 ** (len(UNetOptions.model_validate(self.model.options).channels) - 1)
        bad = [n for n in self.task.patch_size if n % step]
        if bad:
            raise ValueError(
                f"task.patch_size {list(self.task.patch_size)}: every side must be a multiple of "
                f"{step}, because the network halves it {step.bit_length() - 1} times; "
                f"change {bad} or give the network fewer channels"
            )
        if prod(n // step for n in self.task.patch_size) < 2:
            raise ValueError(
                "task.patch_size shrinks to a single voxel inside the network, where a norm has "
                "nothing to normalise: enlarge the patch or give the network fewer channels"
            )
        return self

    def _strategy_fits(self) -> None:
        """Refuse a strategy that this training cannot follow."""
        strategy, optimiser = self.aggregation.strategy, self.training.optimiser
        if strategy == "scaffold" and (optimiser.name != "sgd" or optimiser.momentum):
            raise ValueError(
                "aggregation.strategy: scaffold takes each site's mean gradient from its update, "
                "which plain SGD alone allows: set training.optimiser to name: sgd, momentum: 0"
            )
        personal, trainable = self.aggregation.personal, self.training.trainable
        if personal is not None and trainable != "all":
            if personal not in trainable:
                raise ValueError(
                    f"aggregation.strategy: {strategy} keeps the {personal} at home, but "
                    f"training.trainable: {trainable} does not train them; train all"
                )
            if personal == trainable:
                raise ValueError(
                    f"aggregation.strategy: {strategy} keeps the {personal} at home, and "
                    f"training.trainable: {trainable} trains nothing else: nothing would be shared"
                )
        if self.initial is not None and bool(self.initial.personal) != (personal is not None):
            raise ValueError(
                "initial.personal does not fit aggregation.strategy: run `fedseg plan build` again"
            )

    def _keeps(self, privacy: LocalPrivacy) -> None:
        """Refuse what would break a guarantee, or leave it without its noise."""
        if self.aggregation.strategy in ("scaffold", "ditto"):
            raise ValueError(
                f"aggregation.strategy: {self.aggregation.strategy} makes more from patients than "
                "the update that carries the noise "
                + (
                    "(each site's control variate)"
                    if self.aggregation.strategy == "scaffold"
                    else "(each site's own model, which its scores would tell of)"
                )
                + "; choose another strategy under a guarantee"
            )
        if self.aggregation.weighting != "uniform":
            raise ValueError(
                "aggregation.weighting: patients would weigh each update by a true count, which is "
                "not private; say uniform (privacy.expected_patients weighs larger hospitals more)"
            )
        if self.training.gradient_clip_norm is not None:
            raise ValueError(
                "training.gradient_clip_norm must be null: under a guarantee each patient's "
                "gradient is clipped to privacy.clip_norm, and nothing is clipped twice"
            )
        if privacy.release_after_s >= self.aggregation.round_timeout_s:
            raise ValueError(
                f"privacy.release_after_s ({privacy.release_after_s:g}) must be below "
                f"aggregation.round_timeout_s ({self.aggregation.round_timeout_s:g}): every answer "
                "would come after the coordinator has stopped waiting"
            )
        noised = privacy.outputs.metrics == "noised"
        if noised and "hd95" in self.evaluation.metrics:
            raise ValueError(
                "evaluation.metrics: hd95 has no upper end to clip at, so it cannot leave noised; "
                "measure dice and nsd"
            )

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> Self:
        trainable, has_some = self.training.trainable, self.model.adapters is not None
        if "adapters" in trainable and not has_some:
            raise ValueError(
                f"training.trainable: {trainable} needs adapters, and the network has none: add "
                "model.adapters, for example {rank: 4}, or train another part"
            )
        if has_some and "adapters" not in trainable:
            raise ValueError(
                f"model.adapters would stay as they begin, which is zero, because "
                f"training.trainable: {trainable} does not train them: say adapters or "
                "norms+adapters, or remove model.adapters"
            )
        return self

    @property
    def private(self) -> LocalPrivacy | None:
        """The guarantee that the plan gives, or None."""
        return self.privacy if isinstance(self.privacy, LocalPrivacy) else None

    @property
    def noise(self) -> Calibration:
        """The calibrated noise of a private plan.

        Raises:
            PlanError: the plan was not built yet, or has no guarantee.
        """
        if self.calibrated is None:
            raise PlanError(
                "the plan's noise is not calibrated: run `fedseg plan build study.yaml` first"
            )
        return self.calibrated

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical_bytes).hexdigest()

    @property
    def built(self) -> InitialModel:
        """The initial model's record.

        Raises:
            PlanError: the plan was not built yet.
        """
        if self.initial is None:
            raise PlanError(
                "the plan has no initial model yet: run `fedseg plan build study.yaml` first"
            )
        return self.initial


def parse_plan(data: bytes, source: str = "the plan") -> StudyPlan:
    """Read a plan from YAML (or JSON) bytes.

    Raises:
        PlanError: not YAML, a field is unknown or wrong, or fields contradict each other; the
            message names each field and what to do.
    """
    value = read_mapping(data, source)
    try:
        return StudyPlan.model_validate(value)
    except ValidationError as error:
        raise PlanError(f"{source} does not hold:\n{_explain(error)}") from None


def load_plan(path: str | Path) -> StudyPlan:
    """Read and check a plan file; see `parse_plan`."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from None
    return parse_plan(data, source=path.name)


def _is_json(value: object) -> bool:
    """True where nothing is NaN or infinite."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _explain(error: ValidationError) -> str:
    """One line a field, in the words of the plan."""
    lines = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"]) or "plan"
        message = re.sub(r"^Value error, ", "", item["msg"])
        if item["type"] == "extra_forbidden":
            message = "unknown field: is it misspelt, or in the wrong section?"
        elif item["type"] == "missing":
            message = "missing: `fedseg plan new` shows every field with an example"
        lines.append(f"  {field}: {message}")
    return "\n".join(lines)
