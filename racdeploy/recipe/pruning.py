"""Zeros: how many, where, and the update of the weights that are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from racdeploy.errors import UsageError
from racdeploy.recipe.section import Regex, Section
from racdeploy.results.schema import PositiveCount

_METHOD_DEFAULTS = {"magnitude": {"target": "linear_output", "refit_steps": 0}}
"""Defaults that a method changes: magnitude pruning moves no weight that it keeps."""
_PATTERN = re.compile(r"^(\d+):(\d+)$")
SparsityOrPattern = float | str
"""Zeros of a linear: a sparsity, or a pattern N:M."""


def parse_pattern(zeros: SparsityOrPattern) -> tuple[int, int] | None:
    """Return N and M of a pattern N:M, which keeps N of M weights; None for anything else."""
    match = _PATTERN.match(zeros) if isinstance(zeros, str) else None
    if not match or not 0 < int(match[1]) < int(match[2]):
        return None
    return int(match[1]), int(match[2])


def sparsity_of(zeros: SparsityOrPattern) -> float:
    """Return the share of a linear's weights that are zeros."""
    if not isinstance(zeros, str):
        return zeros
    n_m = parse_pattern(zeros)
    assert n_m, "patterns are validated when the recipe is read"
    return 1 - n_m[0] / n_m[1]


class Pruning(Section):
    """Choice of the zeros and update of the weights that are kept."""

    method: str = "sparsegpt"
    sparsity: float = Field(default=0.5, ge=0, lt=1)
    pattern: str = "unstructured"
    allocation: str = "uniform"
    target: Literal["dense_output", "linear_output"] = "dense_output"
    refit_steps: NonNegativeInt = 20
    damping: float = Field(default=0.01, gt=0, le=1)
    # 60 % zeros, embedded model: held-out error 0.0245 at 16 columns, 0.0314 at 128.
    column_block: PositiveCount = 16
    # In bfloat16, a pruned SmolLM2 is as near to dense, but Gemma 3 has 1.3 times the KL.
    compute: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ignore: tuple[Regex, ...] = ()
    expert_tokens: NonNegativeInt = 0

    def without_zeros(self) -> Self:
        """Return these settings for a walk that makes no weight zero."""
        none = {"sparsity": 0.0, "pattern": "unstructured", "allocation": "uniform"}
        return self.model_copy(update=none)

    @model_validator(mode="before")
    @classmethod
    def _fill_method(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {**_METHOD_DEFAULTS.get(str(values.get("method")), {}), **values}

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str) -> str:
        if value != "unstructured" and parse_pattern(value) is None:
            raise ValueError("neither 'unstructured' nor N:M with 0 < N < M, as 2:4")
        return value

    @model_validator(mode="after")
    def _check_sparsity(self) -> Self:
        if self.n_m is None:
            return self

        if self.allocation != "uniform":
            raise ValueError(
                f"pattern {self.pattern} leaves nothing to allocate; use allocation = 'uniform'"
            )

        kept, of = self.n_m
        implied = 1 - kept / of
        if "sparsity" in self.model_fields_set and abs(self.sparsity - implied) > 1e-9:
            raise ValueError(
                f"pattern {self.pattern} means sparsity {implied:g}, not {self.sparsity:g}"
            )

        # The model is frozen; set the value anyway, so that readers need not know the pattern.
        object.__setattr__(self, "sparsity", implied)
        return self

    @property
    def match_dense(self) -> bool:
        """True if linears match the dense model's outputs.

        Otherwise each matches the outputs of its own dense weights on the pruned model's inputs.
        """
        return self.target == "dense_output"

    @property
    def n_m(self) -> tuple[int, int] | None:
        """N and M of an N:M pattern, or None."""
        return parse_pattern(self.pattern)

    def check_width(self, weight: str, inputs: int) -> None:
        """Refuse a weight with a number of inputs that is not a multiple of its M."""
        if self.n_m and inputs % self.n_m[1]:
            kept, of = self.n_m
            raise UsageError(
                "pattern-does-not-divide",
                f"pattern {kept}:{of} does not divide the {inputs} inputs of {weight}",
                remedy=f"choose an M that divides {inputs}, or --pattern unstructured",
            )
