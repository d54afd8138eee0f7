"""How many strings an engine tokenizes differently from the checkpoint, and the first of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.verify.evidence import TokenProbe

_CHARACTERS = 60  # of the example
_IDS = 8


@dataclass(frozen=True)
class TokenDifferences:
    """A count over strings; ``first`` is the first that differs, None where all are equal."""

    strings: int
    different: int
    first: TokenProbe | None

    @classmethod
    def count(cls, probes: Sequence[TokenProbe]) -> TokenDifferences:
        """Count the probes whose ids differ."""
        wrong = [probe for probe in probes if probe.expected != probe.actual]
        return cls(len(probes), len(wrong), wrong[0] if wrong else None)

    @property
    def share(self) -> float:
        """Fraction of the strings that differ, 0 to 1."""
        return self.different / self.strings if self.strings else 0.0

    @property
    def example(self) -> str:
        """The beginning of the first string that differs, as Python writes it, or nothing."""
        return repr(self.first.text[:_CHARACTERS]) if self.first else ""

    @property
    def share_to_accept(self) -> float:
        """The share in two digits, rounded up: what a recipe would have to accept."""
        if not self.different:
            return 0.0
        unit = 10.0 ** (math.floor(math.log10(self.share)) - 1)
        return float(f"{math.ceil(self.share / unit) * unit:.1e}")

    def __str__(self) -> str:
        """Return one sentence, without a full stop."""
        if self.first is None:
            return f"{self.strings} strings, equal ids"

        expected, actual = list(self.first.expected[:_IDS]), list(self.first.actual[:_IDS])
        counted = f"{self.different} of {self.strings} strings differ"
        return f"{counted}; the first is {self.example}: {expected} expected, {actual} found"
