"""Comparison of an engine's token ids with the checkpoint's tokenizer over many strings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.verification.evidence import TokenProbe

_EXAMPLE_CHARACTERS = 60
_EXAMPLE_IDS = 8


@dataclass(frozen=True)
class TokenComparison:
    """Count of strings with different ids; ``first`` is the first of them, or None."""

    strings: int
    different: int
    first: TokenProbe | None

    @classmethod
    def count(cls, probes: Sequence[TokenProbe]) -> TokenComparison:
        """Count the probes whose ids differ."""
        wrong = [probe for probe in probes if probe.expected != probe.actual]
        return cls(len(probes), len(wrong), wrong[0] if wrong else None)

    @property
    def share(self) -> float:
        """Fraction of the strings that differ, 0 to 1."""
        return self.different / self.strings

    @property
    def example(self) -> str:
        """Beginning of the first string that differs, as a Python literal; empty if none does."""
        return repr(self.first.text[:_EXAMPLE_CHARACTERS]) if self.first else ""

    @property
    def share_to_accept(self) -> float:
        """Share rounded up to two significant digits, for the recipe to accept."""
        if not self.different:
            return 0.0
        unit = 10.0 ** (math.floor(math.log10(self.share)) - 1)
        return float(f"{math.ceil(self.share / unit) * unit:.1e}")

    def __str__(self) -> str:
        """Return one sentence, without a full stop."""
        if self.first is None:
            return f"{self.strings} strings, equal ids"

        expected = list(self.first.expected[:_EXAMPLE_IDS])
        actual = list(self.first.actual[:_EXAMPLE_IDS])
        counted = f"{self.different} of {self.strings} strings differ"
        return f"{counted}; the first is {self.example}: {expected} expected, {actual} found"
