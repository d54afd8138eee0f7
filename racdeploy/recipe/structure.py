"""Structured pruning: parts that are cut, and shares that are kept."""

from __future__ import annotations

from typing import Self

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from racdeploy import plugins
from racdeploy.plugins import Names
from racdeploy.recipe.section import Section, check_plugin


class Structure(Section):
    """Structured pruning, done before zeros are chosen in the weights that are left.

    ``keep`` maps a part, named as its plugin, to the share that is kept; for the vocabulary, a
    number of tokens is also accepted. With ``optional`` a part is cut less, or not at all, if the
    model or the format does not allow it; otherwise that is an error.
    """

    keep: dict[str, float] = Field(default={})
    optional: bool = False
    uniform: bool = False
    multiple: NonNegativeInt = 0
    criterion: str = "error"
    vocabulary_text: Names = ()

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, value: dict[str, float]) -> dict[str, float]:
        for part, share in value.items():
            check_plugin("structures", "part", part)
            counted = plugins.read_constants("structures", part).get("COUNT_UNIT")
            if not (0 < share <= 1 or (counted and share > 0 and share.is_integer())):
                also = f", or a count of {counted}" if counted else ""
                raise ValueError(f"{part} = {share:g} is not a share above 0, up to 1{also}")
        return value

    @property
    def cut_parts(self) -> Names:
        """Names of the parts that are cut, sorted."""
        return tuple(sorted(part for part, share in self.keep.items() if share != 1))

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        if self.vocabulary_text and not self.cuts_vocabulary:
            raise ValueError("vocabulary_text without vocabulary in keep")
        return self

    @property
    def sizes(self) -> frozenset[str]:
        """Letters of the dimensions that shrink, see :mod:`racdeploy.pruning.structures`."""
        read = plugins.read_constants
        return frozenset(read("structures", part)["SIZE_LETTER"] for part in self.cut_parts)

    @property
    def cuts_vocabulary(self) -> bool:
        """True if the vocabulary is cut."""
        return "V" in self.sizes

    @property
    def width_multiple(self) -> int:
        """Divisor of feed-forward widths; most number formats have blocks of 32."""
        return self.multiple or 32

    def kept_share(self, part: str) -> float:
        """Return the share of a part that is kept; 1 if it is not cut."""
        return self.keep.get(part, 1.0)
