"""Values that came through a door: checked once, unchangeable afterwards, with canonical bytes."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Frozen(BaseModel):
    """A value that came through a door: unknown keys are refused, nothing changes afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def canonical_bytes(self) -> bytes:
        """The bytes that are signed and digested: UTF-8 JSON, sorted keys, no spaces."""
        value = self.model_dump(mode="json")
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
