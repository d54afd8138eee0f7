"""Counts completions while they grow, for a progress callback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.engines.engine import Completion, Progress


@dataclass
class Counter:
    """Whole completions and tokens under a label; ``total`` is the number of completions."""

    progress: Progress | None
    label: str
    total: int
    tokens: int = 0
    _kept: int = 0  # completions that are on disk
    _ended: int = 0  # those beside them

    def on_tokens(self, index: int, ids: Sequence[int], ended: Completion | None) -> None:
        """Take new ids of a completion, as an engine gives them."""
        self.tokens += len(ids)
        self._ended += ended is not None
        self._report()

    def keep(self, kept: int) -> None:
        """Say how many completions are on disk."""
        self._kept, self._ended = kept, 0
        self._report()

    def _report(self) -> None:
        if self.progress:
            done = min(self._kept + self._ended, self.total)
            self.progress(self.label, done, self.total, self.tokens)
