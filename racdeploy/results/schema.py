"""Base class of all data models of a report, and types of numbers with their ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

PositiveCount = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
FiniteNonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
Difference = Annotated[float, Field(ge=-1, le=1)]
# A ratio of means; infinite if the denominator is zero.
Ratio = Annotated[
    float,
    Field(ge=0),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"const": "Infinity"}]}),
]


class FrozenModel(BaseModel):
    """Data model that is immutable and refuses unknown keys."""

    # An unbounded interval has infinite ends, for which JSON has no number.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
