"""A released model: one self-describing container with the tensors and the plan they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from numpy.typing import NDArray
from pydantic import ValidationError, model_validator

from fedseg.arrays import Arrays, digest_of
from fedseg.container import packed, unpack
from fedseg.durable import write_atomically
from fedseg.errors import DataError, TrustError
from fedseg.frozen import Digest, Frozen
from fedseg.plan import StudyPlan

MAX_MODEL_BYTES = 8 * 1024**3
FINETUNED, LOCAL = "finetuned", "local"


class ModelHeader(Frozen):
    """What is needed to use a model, and where it comes from.

    Attributes:
        arm: how it was trained: federated, pooled, local, initial, personal, or finetuned.
        rounds: closed rounds of training.
        released: digest of the shared model that a hospital's own one was made from; None where
            it is the shared one itself.
        private: whether it keeps the guarantee of its plan: False where the noise was seeded or
            where it was fine-tuned without any, None where there is no guarantee, or nothing was
            trained on patients yet.
    """

    format: Literal["fedseg-model/1"] = "fedseg-model/1"
    plan: StudyPlan
    plan_digest: Digest
    model_digest: Digest
    arm: str
    rounds: int
    released: Digest | None = None
    private: bool | None = None

    @model_validator(mode="after")
    def _plan_is_the_one(self) -> Self:
        if self.plan.digest != self.plan_digest:
            raise ValueError("the plan's digest is not that of the plan")
        if self.private is not None and self.plan.private is None:
            raise ValueError("a plan without a guarantee gives no model that keeps one")
        if self.arm == FINETUNED and self.released is None:
            raise ValueError("a fine-tuned model names the shared one that it was made from")
        return self

    @property
    def stays(self) -> bool:
        """True for what one hospital made of its own patients without a guarantee."""
        return (self.released is not None or self.arm == LOCAL) and not self.private


def save_model(
    path: Path,
    plan: StudyPlan,
    model: Arrays,
    *,
    arm: str,
    rounds: int,
    seeded: bool = False,
    released: str | None = None,
    mode: int = 0o644,
) -> ModelHeader:
    """Write a model file, atomically, and give what it says of itself.

    Args:
        seeded: its noise was seeded, so that it keeps no guarantee whatever its plan says.
        released: see `ModelHeader`.
        mode: of the file.
    """
    kept = not seeded and arm != FINETUNED
    header = ModelHeader(
        plan=plan,
        plan_digest=plan.digest,
        model_digest=digest_of(model),
        arm=arm,
        rounds=rounds,
        released=released,
        private=kept if plan.private is not None and rounds else None,
    )
    write_atomically(path, packed(header, model), mode)
    return header


def load_model(path: Path) -> tuple[ModelHeader, dict[str, NDArray[Any]]]:
    """Read a model file.

    Raises:
        DataError: the file cannot be read.
        TrustError: it is too large (then it stays unread), it is no model of fedseg, or its tensors
            are not the ones it names.
    """
    try:
        size = path.stat().st_size
        if size > MAX_MODEL_BYTES:
            raise TrustError(f"{path.name} has {size} bytes, at most {MAX_MODEL_BYTES} are allowed")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the model {path.name}: {error.strerror}") from None
    header, model = unpack(data, ModelHeader, max_bytes=MAX_MODEL_BYTES, schema=None)
    try:
        digest = digest_of(model)
    except ValidationError:
        raise TrustError(
            f"{path.name}: its tensors are no model's: a name or a shape is absurd"
        ) from None
    if digest != header.model_digest:
        raise TrustError(f"{path.name}: the tensors are not the ones that its header names")
    return header, model
