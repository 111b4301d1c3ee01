"""Which network is trained: the plan's section `model`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from fedseg.frozen import Count, Frozen, Name


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


def _is_json(value: object) -> bool:
    """True where nothing is NaN or infinite."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
