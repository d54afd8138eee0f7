"""What all records of a report are made from, and the ranges of their numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
InnerShare = Annotated[float, Field(gt=0, lt=1)]
Difference = Annotated[float, Field(ge=-1, le=1)]
# A ratio of means, infinite where the denominator is zero.
Ratio = Annotated[
    float,
    Field(ge=0),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"const": "Infinity"}]}),
]


class Part(BaseModel):
    """A record that cannot be changed and has no key that is not known."""

    # An unbounded interval has infinite ends; "strings" keeps the file valid JSON.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
