"""Distillation of the dense model into the pruned one."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    field_validator,
    model_validator,
)

from racdeploy.recipe.section import MAX_SAMPLES, Section, check_plugin
from racdeploy.results.schema import OpenShare, PositiveCount, Share

RecoverMethod = Annotated[str, AfterValidator(partial(check_plugin, "recover_methods", "method"))]
TrainingObjective = Annotated[str, AfterValidator(partial(check_plugin, "objectives", "objective"))]


class Recovery(Section):
    """Distillation of the dense model into the pruned one; off at 0 tokens.

    ``methods`` are plugins that run in order on the dense model's traces; an empty list selects the
    best method that fits into memory. The share ``on_policy`` of the tokens is learned on the
    pruned model's own answers, in ``rounds``.

    ``shorten`` lets the dense model learn to think less before it is pruned: True as short as its
    accuracy allows, or down to a share of its thinking. In each of ``rounds`` it answers every
    calibration prompt ``samples`` times and learns by ``objective``, a plugin; ``instruction`` is
    the system prompt of the objective ``concise``.
    """

    tokens: NonNegativeInt = 0
    shorten: bool | float = False
    objective: TrainingObjective = "preference"
    samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 8
    instruction: str = "Think briefly: no repetition, no second check of what is clear."
    methods: tuple[RecoverMethod, ...] = ()
    on_policy: Share = 0.25
    rounds: PositiveCount = 2
    max_accuracy_drop: float = Field(default=0.01, ge=0, lt=1)
    learning_rate: NonNegativeFloat = 0.0
    batch_tokens: PositiveCount = 2048
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    extra_text: str = ""
    extra_text_share: OpenShare = 0.3
    seed: NonNegativeInt = 0

    @field_validator("shorten", mode="plain")
    @classmethod
    def _check_share(cls, value: Any) -> Any:
        if value is False or (isinstance(value, int | float) and 0 < value <= 1):
            return value
        raise ValueError("true, or a share above 0 and up to 1")

    @model_validator(mode="after")
    def _check_shortening(self) -> Self:
        if not self.shorten:
            return self
        if "blockwise" in self.methods:
            raise ValueError("'blockwise' sees one block, shorten needs 'full' or 'scales'")
        return self
