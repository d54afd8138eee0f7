"""Count completions and tokens while they are generated, for a progress callback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.engines.engine import Completion, Progress


@dataclass
class CompletionProgress:
    """Progress of ``total`` completions under a label: ended completions, and tokens."""

    progress: Progress | None
    label: str
    total: int
    tokens: int = 0
    _saved: int = 0  # completions on disk
    _ended: int = 0  # completions that have ended and are not on disk yet

    def on_tokens(self, index: int, ids: Sequence[int], ended: Completion | None) -> None:
        """Count new ids of a completion; an engine calls it."""
        self.tokens += len(ids)
        self._ended += ended is not None
        self._report()

    def set_saved(self, count: int) -> None:
        """Set the number of completions on disk."""
        self._saved, self._ended = count, 0
        self._report()

    def _report(self) -> None:
        if self.progress:
            done = min(self._saved + self._ended, self.total)
            self.progress(self.label, done, self.total, self.tokens)
