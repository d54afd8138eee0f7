"""Counts what a collection has come to while its answers grow, for a progress callback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.engines.engine import Completion, Progress


@dataclass
class Counter:
    """Whole answers and tokens of a collection.

    Args:
        total: answers in all.
        stop_ids: tokens of which one ends an answer.
    """

    progress: Progress | None
    total: int
    stop_ids: tuple[int, ...]
    tokens: int = 0
    _kept: int = 0  # answers whose shard is on disk
    _ended: int = 0  # answers beside them

    def resume(self, begun: Sequence[Sequence[int]]) -> None:
        """Take what an earlier run had of the answers that follow."""
        self._ended += sum(bool(ids) and ids[-1] in self.stop_ids for ids in begun)
        self._report()

    def on_tokens(self, index: int, ids: Sequence[int]) -> None:
        """Take new ids of a growing answer."""
        self.tokens += len(ids)
        self._ended += bool(ids) and ids[-1] in self.stop_ids
        self._report()

    def on_completion(self, completion: Completion) -> None:
        """Take a whole answer."""
        self.tokens += len(completion.ids)
        self._ended += 1
        self._report()

    def keep(self, kept: int) -> None:
        """Say how many answers are on disk."""
        self._kept, self._ended = kept, 0
        self._report()

    def _report(self) -> None:
        if self.progress:
            done = min(self._kept + self._ended, self.total)
            self.progress("traces", done, self.total, self.tokens)
