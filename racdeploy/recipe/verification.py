"""Verification, and settings of the deployed model, with which it is also verified."""

from __future__ import annotations

from typing import Self

from pydantic import Field, NonNegativeInt, model_validator

from racdeploy.manifest import MAX_TOKENS
from racdeploy.plugins import Names
from racdeploy.recipe.section import MAX_PROMPTS, MAX_SAMPLES, BatchSize, Section
from racdeploy.results.answers import HESITATION_WORDS
from racdeploy.results.schema import FiniteNonNegative


class Verification(Section):
    """Comparison of the artifact with the dense model."""

    count: int = Field(default=200, ge=1, le=MAX_PROMPTS)
    samples: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    max_new_tokens: int = Field(default=1024, ge=1, le=MAX_TOKENS)
    max_thinking_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    temperature: FiniteNonNegative = 0.0
    logit_traces: int = Field(default=16, ge=0, le=MAX_PROMPTS)
    controls: Names = ()
    parallel: BatchSize = 16
    context_tokens: int = Field(default=2048, ge=16, le=MAX_TOKENS)
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.samples} samples at temperature 0 are {self.samples} equal completions"
            )
        return self


class Thinking(Section):
    """Control of the exported model's thinking; see docs/thinking.md.

    ``closing`` also applies to a budget that an app or user sets later.
    """

    max_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    closing: str = ""
    hesitation: Names = HESITATION_WORDS
    hesitation_penalty: FiniteNonNegative = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.hesitation and self.hesitation_penalty:
            raise ValueError("hesitation is empty: there are no words to penalize")
        return self


class Runtime(Section):
    """Settings of the deployed model, with which it is also verified."""

    thinking: Thinking = Thinking()
