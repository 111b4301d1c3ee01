"""The study plan: what a consortium proposes and every hospital approves.

The plan is data. It is read once from YAML, checked field by field and across fields, and frozen.
Its canonical bytes (UTF-8 JSON, sorted keys, no spaces) give its digest; two plans with the same
digest ask for the same study. Nothing here needs torch: the coordinator reads plans too.
"""

from __future__ import annotations

import hashlib
import re
from math import prod
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError, model_validator

from fedseg.errors import PlanError
from fedseg.frozen import Frozen, Name
from fedseg.measures import Evaluation
from fedseg.network import Model, UNetOptions
from fedseg.promise import Calibration, LocalPrivacy, NoPrivacy, Privacy
from fedseg.schema import InitialModel
from fedseg.strategy import Aggregation
from fedseg.strictyaml import read_mapping
from fedseg.task import Task
from fedseg.training import Training

MOST_TOLD = 20


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
        if self.evaluation.own_models:
            self._own_models_fit()
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

    def _own_models_fit(self) -> None:
        """Refuse own models that are not known elsewhere, or that nobody could measure or pay."""
        strategy, metrics = self.aggregation.strategy, self.privacy.outputs.metrics
        wrong = None
        if self.aggregation.personal is not None or strategy == "ditto":
            wrong = (
                f"{strategy} keeps a part of each hospital's own model at home, where alone it can "
                "be measured (`fedseg-site validate`)"
            )
        elif self.aggregation.minimum_sites < 2:
            wrong = "with aggregation.minimum_sites: 1 there need be no other hospital"
        elif metrics == "none":
            wrong = "privacy.outputs.metrics: none lets no hospital tell what it measured"
        elif metrics == "noised":
            wrong = (
                "privacy.outputs.metrics: noised charges held-back patients for each model that is "
                "measured, and nobody knows beforehand how many hospitals consent; say suppressed, "
                "which no guarantee covers, where the hospitals' policies let that leave"
            )
        if wrong is not None:
            raise ValueError(f"evaluation.own_models: {wrong}; or leave own_models out")

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

    def lets_own_models_go(self, round_: int) -> bool:
        """Whether sites may let their own models go with the updates of this round: the last."""
        return self.evaluation.own_models and round_ == self.aggregation.rounds

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


def _explain(error: ValidationError) -> str:
    """One line a field, in the words of the plan; of very many the first."""
    lines = []
    for item in error.errors(include_url=False)[:MOST_TOLD]:
        field = ".".join(str(part) for part in item["loc"]) or "plan"
        message = re.sub(r"^Value error, ", "", item["msg"])
        if item["type"] == "extra_forbidden":
            message = "unknown field: is it misspelt, or in the wrong section?"
        elif item["type"] == "missing":
            message = "missing: `fedseg plan new` shows every field with an example"
        lines.append(f"  {field}: {message}")
    if error.error_count() > MOST_TOLD:
        lines.append(f"  and {error.error_count() - MOST_TOLD} more")
    return "\n".join(lines)
