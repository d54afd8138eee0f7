"""Progress on stderr: a bar per stage on a terminal, else a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from racdeploy.engines.engine import Progress
from racdeploy.report.tables import format_duration

LINE_EVERY_S = 10.0
_BAR_WIDTH = 16  # all columns of a bar fit a terminal of 80
_PERCENT_FROM = 10_000  # larger counts are bytes or tokens, which nobody reads one by one
_KNOWN_SHARE, _KNOWN = 8, 64
"""Answers are decoded together, and short ones end first: the remaining time is estimated only
after an eighth of them, or this many."""


@dataclass
class StageProgress:
    """Progress of one stage; times are of :func:`time.monotonic`.

    Args:
        first: units that an earlier run finished.
        tokens: tokens generated or trained on so far; 0 for stages without tokens.
    """

    label: str
    began_s: float
    first: int
    done: int
    total: int
    tokens: int = 0
    ended_s: float | None = None

    def update(self, done: int, total: int, tokens: int, now_s: float) -> None:
        """Store the arguments of a progress callback."""
        if tokens and not self.tokens:  # the model is loaded from here on
            self.began_s = now_s

        self.done, self.total, self.tokens = done, total, tokens
        if self.is_finished and self.ended_s is None:
            self.ended_s = now_s

    @property
    def is_finished(self) -> bool:
        return self.done >= self.total

    @property
    def amount(self) -> str:
        """Finished units: a count, or per cent of a large total."""
        if self.total < _PERCENT_FROM:
            return f"{self.done}/{self.total}"
        return f"{self.done / self.total:.0%}"

    def list_words(self, now_s: float) -> list[str]:
        """Return amount, speed if it is known, and remaining or elapsed time."""
        elapsed_s = (self.ended_s or now_s) - self.began_s
        words = [self.amount]

        if self.tokens and elapsed_s >= 1:  # the first tokens tell no speed
            words.append(f"{self.tokens / elapsed_s:,.0f} tokens/s")

        remaining_s = self.estimate_remaining_s(now_s)
        if self.is_finished:
            words.append(f"took {format_duration(elapsed_s)}")
        elif remaining_s is not None:
            words.append(f"about {format_duration(remaining_s)} left")
        elif elapsed_s >= 1:
            words.append(f"{format_duration(elapsed_s)} so far")

        return words

    def estimate_remaining_s(self, now_s: float) -> float | None:
        """Return the remaining seconds at the speed so far; None if it is too early to tell."""
        new, missing = self.done - self.first, self.total - self.done
        needed = 1
        if self.tokens:
            needed = max(1, min((self.total - self.first) // _KNOWN_SHARE, _KNOWN))

        if new < needed:
            return None
        return (now_s - self.began_s) * missing / new


class StageProgresses:
    """Stages of a run by label; a label that starts again is a new stage."""

    def __init__(self) -> None:
        self._open: dict[str, StageProgress] = {}

    def update(self, label: str, done: int, total: int, tokens: int) -> tuple[StageProgress, bool]:
        """Return the progress of a label, and True if the stage is new."""
        now_s = time.monotonic()
        track = self._open.get(label)
        is_new = track is None or done < track.done

        if track is None or is_new:
            track = StageProgress(label, now_s, first=done, done=done, total=total)
            self._open[label] = track

        track.update(done, total, tokens, now_s)
        return track, is_new


class _Words(bars.ProgressColumn):
    """Column with amount, speed and time of a stage."""

    def render(self, task: bars.Task) -> Text:
        track: StageProgress = task.fields["track"]
        return Text("  ".join(track.list_words(time.monotonic())))


@contextmanager
def show_progress(console: Console, quiet: bool = False, keep: bool = True) -> Iterator[Progress]:
    """Yield a progress callback that draws bars on a terminal, and else prints lines.

    ``keep`` leaves the bars of finished stages on the screen.
    """
    if quiet:
        yield lambda label, done, total, tokens=0: None
    elif console.is_terminal:
        label = bars.TextColumn("{task.description:<16}")
        with bars.Progress(label, bars.BarColumn(_BAR_WIDTH), _Words(), console=console) as shown:
            yield fill_bars(shown, keep)
    else:
        yield print_lines(console)


def fill_bars(shown: bars.Progress, keep: bool) -> Progress:
    """Return a progress callback that fills bars; ``keep`` leaves those of finished stages."""
    tracks = StageProgresses()
    tasks: dict[int, bars.TaskID] = {}

    def draw(label: str, done: int, total: int, tokens: int = 0) -> None:
        track, is_new = tracks.update(label, done, total, tokens)
        if is_new:
            tasks[id(track)] = shown.add_task(label, total=total, track=track)
        if id(track) in tasks:
            shown.update(tasks[id(track)], completed=done, total=total)

        if track.is_finished and not keep and id(track) in tasks:
            shown.remove_task(tasks.pop(id(track)))

    return draw


def print_lines(console: Console) -> Progress:
    """Return a progress callback that prints a line every ``LINE_EVERY_S``."""
    tracks = StageProgresses()
    printed_s: dict[str, float] = {}

    def advance(label: str, done: int, total: int, tokens: int = 0) -> None:
        track, is_new = tracks.update(label, done, total, tokens)
        now_s = time.monotonic()

        ends_now = track.is_finished and label in printed_s
        due = now_s - printed_s.get(label, now_s) >= LINE_EVERY_S
        if not (is_new or ends_now or due):
            return

        printed_s[label] = now_s
        if track.is_finished:
            del printed_s[label]
        line = f"{label} {', '.join(track.list_words(now_s))}"
        console.print(line, markup=False, soft_wrap=True)

    return advance
