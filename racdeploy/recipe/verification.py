"""Verification, and settings of the deployed model, with which it is also verified."""

from __future__ import annotations

from typing import Self

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from racdeploy.manifest import MAX_TOKENS
from racdeploy.plugins import Names
from racdeploy.recipe.section import MAX_PROMPTS, MAX_SAMPLES, BatchSize, Section
from racdeploy.recipe.traces import FIRST_LIMIT
from racdeploy.results.answers import HESITATION_WORDS
from racdeploy.results.schema import FiniteNonNegative

_MIN_CONTEXT_TOKENS = 16
_USUAL_CONTEXT_TOKENS = 2 * FIRST_LIMIT  # a question and its answer


class Verification(Section):
    """Comparison of the artifact with the dense model."""

    count: int = Field(default=200, ge=1, le=MAX_PROMPTS)
    samples: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    sequential: bool = True
    max_new_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)  # 0: :meth:`with_limits`
    max_thinking_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    temperature: FiniteNonNegative = 0.0
    logit_traces: int = Field(default=16, ge=0, le=MAX_PROMPTS)
    controls: Names = ()
    parallel: BatchSize = 16
    context_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)  # 0: :meth:`with_limits`
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.samples} samples at temperature 0 are {self.samples} equal completions"
            )
        return self

    @field_validator("context_tokens")
    @classmethod
    def _check_context(cls, value: int) -> int:
        if 0 < value < _MIN_CONTEXT_TOKENS:
            raise ValueError(f"less than {_MIN_CONTEXT_TOKENS}; 0 is what prompt and answer need")
        return value

    def with_limits(
        self, answer_tokens: int = FIRST_LIMIT, prompt_tokens: int = 0, positions: int = MAX_TOKENS
    ) -> Self:
        """Return these settings with the limits that are not set, 0, filled in.

        Args:
            answer_tokens: as many as the model needs, with its thinking.
            prompt_tokens: of the longest prompt.
            positions: tokens that the model was made for, the most that a context may have.
        """
        answer_tokens = self.max_new_tokens or max(answer_tokens, FIRST_LIMIT)
        needed = max(prompt_tokens + answer_tokens + 1, _USUAL_CONTEXT_TOKENS)
        limits = {
            "max_new_tokens": answer_tokens,
            "context_tokens": self.context_tokens or min(needed, positions),
        }
        return self.model_copy(update=limits)


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
