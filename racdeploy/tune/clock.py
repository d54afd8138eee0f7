"""The time that a search may take, and what of it each stage may have used when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_SHARES = {"compare": 0.5, "race": 0.7}
"""Of the whole budget, counted from the beginning; what is left is for the verification."""


@dataclass
class Clock:
    """Counts from when it is made; ``seconds`` has how long each stage took."""

    budget_s: float
    now: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.now()

    @property
    def elapsed_s(self) -> float:
        return self.now() - self._began

    def left_s(self, stage: str) -> float:
        """Return how many seconds a stage has left, by the share that it may use."""
        return share_s(stage, self.budget_s) - self.elapsed_s

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count how long a stage takes."""
        began = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - began


def share_s(stage: str, budget_s: float) -> float:
    """Return how many seconds from the beginning a stage may last."""
    return _SHARES[stage] * budget_s
