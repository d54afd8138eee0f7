"""Search for the best model, and what the models of a ladder are measured by."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, field_validator

from racdeploy.plugins import Names
from racdeploy.recipe.pruning import SparsityOrPattern, parse_pattern, sparsity_of
from racdeploy.recipe.section import MAX_PROMPTS, MAX_SECONDS, Section
from racdeploy.results.schema import FiniteNonNegative, Share


class Tune(Section):
    """Objective, limits and candidates of ``racdeploy tune``; a limit of 0 is off.

    Each number format of the target (or of ``quants``) is a candidate unpruned, with each share
    ``ffn`` of the feed-forward part kept, and with each entry of ``zeros``.
    """

    objective: Literal["size", "speed", "seconds-per-correct-answer", "accuracy"] = "accuracy"
    max_bytes: NonNegativeInt = 0
    max_memory_bytes: NonNegativeInt = 0
    min_tokens_per_s: FiniteNonNegative = 0.0
    min_accuracy_ratio: Share = 0.0
    budget_s: float = Field(default=3600.0, gt=0, le=MAX_SECONDS)
    quants: Names = ()
    ffn: tuple[float, ...] = (0.875, 0.75, 0.625, 0.5)
    zeros: tuple[SparsityOrPattern, ...] = ()
    vocabulary: tuple[int, ...] = ()
    recover_tokens: NonNegativeInt = 0
    prompts: int = Field(default=256, ge=16, le=MAX_PROMPTS)
    seed: NonNegativeInt = 1

    @field_validator("ffn", "zeros")
    @classmethod
    def _check_shares(cls, value: tuple[SparsityOrPattern, ...]) -> tuple[SparsityOrPattern, ...]:
        for zeros in value:
            is_pattern = isinstance(zeros, str)
            if is_pattern and parse_pattern(zeros) is None:
                raise ValueError(f"{zeros!r} is not N:M, as 2:4")
            if not is_pattern and not 0 < sparsity_of(zeros) < 1:
                raise ValueError(f"{zeros:g} is not a share between 0 and 1")
        return value

    @field_validator("vocabulary")
    @classmethod
    def _check_vocabulary(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        for tokens in value:
            if tokens < 2:
                raise ValueError(f"{tokens} is not a vocabulary size: keep at least 2 tokens")
        return value

    @property
    def effective_min_accuracy_ratio(self) -> float:
        """Minimum ratio of accuracy to the dense model's; 0.98 by default for size and speed."""
        if self.min_accuracy_ratio or self.objective in ("accuracy", "seconds-per-correct-answer"):
            return self.min_accuracy_ratio
        return 0.98


class LadderLimits(Section):
    """What a rung is measured by: the file that people download.

    Args:
        no_worse_than: number format or preset in which the engine's own tool stores the dense
            model; empty is the narrow one that people download.
        max_excess: a rung may be farther from the dense model by this share of the download's KL,
            on held-out traces and on text.
        min_speed: decoding speed, to the download's.
    """

    no_worse_than: str = ""
    max_excess: FiniteNonNegative = 0.1
    min_speed: FiniteNonNegative = 0.97
