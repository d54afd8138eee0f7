"""Progress line of a training: tokens, losses, tokens per second, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable


class ProgressLine:
    """Prints progress; speed is measured from the state that this process started at."""

    def __init__(self, total: int, done: int, notify: Callable[[str], None] | None) -> None:
        self._total, self._start_tokens, self._notify = total, done, notify
        self._start_s = time.perf_counter()

    def show(self, done: int, measured: str) -> None:
        """Print a line after ``done`` of all tokens, with what was measured there."""
        if not self._notify:
            return

        seconds = time.perf_counter() - self._start_s
        learned = done - self._start_tokens
        line = f"recover: {done:,} of {self._total:,} tokens, {measured}"

        if learned and seconds:
            speed = learned / seconds
            remaining_s = max(0, self._total - done) / speed
            remaining = (
                f"{remaining_s / 60:.0f} min" if remaining_s >= 90 else f"{remaining_s:.0f} s"
            )
            line += f", {speed:,.0f} tokens/s, about {remaining} left"

        self._notify(line)
