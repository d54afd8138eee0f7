"""One line for a person who waits: how far it is, what it gained, how fast, and how long still."""

from __future__ import annotations

import time
from collections.abc import Callable


class Watch:
    """Says how a training goes; counts from where this process began."""

    def __init__(self, total: int, done: int, notify: Callable[[str], None] | None) -> None:
        self._total, self._began_at, self._notify = total, done, notify
        self._began = time.perf_counter()

    def show(self, done: int, what: str) -> None:
        """Print a line after ``done`` of all tokens; ``what`` was measured there."""
        if not self._notify:
            return

        seconds = time.perf_counter() - self._began
        learned = done - self._began_at
        line = f"recover: {done:,} of {self._total:,} tokens, {what}"

        if learned and seconds:
            speed = learned / seconds
            left_s = max(0, self._total - done) / speed
            left = f"{left_s / 60:.0f} min" if left_s >= 90 else f"{left_s:.0f} s"
            line += f", {speed:,.0f} tokens/s, about {left} left"

        self._notify(line)
