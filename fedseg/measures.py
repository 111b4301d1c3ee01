"""What is measured on held-out patients, and how often: the plan's section `evaluation`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fedseg.frozen import Count, Frozen, Positive

Metric = Literal["dice", "hd95", "nsd"]


class Evaluation(Frozen):
    """What is measured on each site's `val` patients, and how often.

    `own_models` measures each hospital's own model at all hospitals too, after the last round: the
    last shared model with that hospital's last update, where its policy consents.
    """

    metrics: tuple[Metric, ...] = ("dice", "hd95", "nsd")
    every_rounds: Count = 5
    tolerance_mm: Positive = 1.0
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    own_models: bool = False

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without own models the bytes, and so the digest, are those of plans before there were."""
        value: dict[str, Any] = handler(self)
        if not self.own_models:
            value.pop("own_models", None)
        return value

    @model_validator(mode="after")
    def _has_dice(self) -> Self:
        if "dice" not in self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise ValueError("metrics must name dice, and each metric once")
        return self
