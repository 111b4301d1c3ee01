"""The tensors of a model by name, shape and dtype, and which of them an update carries.

The plan's section `initial`, which `fedseg plan build` writes, names the model that a study starts
from; every task and every answer keeps its schema.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedseg.frozen import Digest, Frozen


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
