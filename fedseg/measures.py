"""What is measured on held-out patients, and how often: the plan's section `evaluation`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedseg.frozen import Count, Frozen, Positive

Metric = Literal["dice", "hd95", "nsd"]


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
