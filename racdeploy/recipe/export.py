"""Format of the exported file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, field_validator

from racdeploy import plugins
from racdeploy.recipe.section import Regex, Section

MAX_TOKEN_DIFFERENCES = 0.05
"""Maximum share of strings tokenized differently; beyond it the pre-tokenizer is a wrong one."""


class Export(Section):
    """Format of the exported file.

    ``tensors`` maps patterns of tensor names to number formats; the first match overrides the
    preset. ``rounding`` is ``nearest`` or ``optimized``: codes are chosen while pruning to reduce
    the error of the outputs, with or without zeros. Unset, it is optimized wherever that is
    possible. ``allow_losing_zeros`` permits a number format that does not represent zeros exactly,
    and ``accept_token_differences`` an engine that tokenizes up to that share of hard strings
    differently.
    """

    format: str = "gguf"
    quant: str = "q8_0"
    packing: str = "plain"
    rounding: Literal["nearest", "optimized"] | None = None
    pre_tokenizer: str | None = None
    accept_token_differences: float = Field(
        default=0.0, ge=0, le=MAX_TOKEN_DIFFERENCES, allow_inf_nan=False
    )
    exporter: str = "auto"
    tensors: dict[Regex, str] = Field(default={})
    importance: str = ""
    split_bytes: NonNegativeInt = 48_000_000_000
    allow_losing_zeros: bool = False

    @field_validator("quant")
    @classmethod
    def _fold_quant(cls, value: str) -> str:
        return value.lower().replace("-", "_")

    @field_validator("tensors")
    @classmethod
    def _check_tensors(cls, value: dict[str, str]) -> dict[str, str]:
        known = plugins.list_names("quant")
        checked = {}

        for pattern, quant in value.items():
            name = checked[pattern] = quant.lower()
            if name not in known:
                nearest = plugins.suggest(name, known)
                raise ValueError(f"unknown quant {quant!r} for {pattern!r}{nearest}")
        return checked
