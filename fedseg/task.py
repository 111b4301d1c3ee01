"""What a study segments, and in which images: the plan's section `task`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from fedseg.frozen import Count, Frozen, Positive

Modality = Literal["MR", "CT"]


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
