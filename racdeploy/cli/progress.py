"""Progress on stderr: a bar per stage on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from racdeploy.engines.engine import Progress

LINE_EVERY_S = 10.0
_BAR_WIDTH = 16  # all columns of a bar fit a terminal of 80
_PERCENT_FROM = 10_000  # larger counts are bytes or tokens, which nobody reads one by one
_KNOWN_SHARE, _KNOWN = 8, 64
"""Answers are decoded together and short ones end first: what they take is known from an eighth of
them on, or from this many."""


@dataclass
class Track:
    """How far one stage is; times are of :func:`time.monotonic`.

    Args:
        first: units that an earlier run had done.
        tokens: generated or learned since it began; 0 where units are something else.
    """

    label: str
    began_s: float
    first: int
    done: int
    total: int
    tokens: int = 0
    ended_s: float | None = None

    def update(self, done: int, total: int, tokens: int, now_s: float) -> None:
        """Take what a progress callback gets."""
        if tokens and not self.tokens:  # the model is loaded from here on
            self.began_s = now_s

        self.done, self.total, self.tokens = done, total, tokens
        if self.ended and self.ended_s is None:
            self.ended_s = now_s

    @property
    def ended(self) -> bool:
        return self.done >= self.total

    @property
    def amount(self) -> str:
        """How much is done, as a count or as per cent."""
        if self.total < _PERCENT_FROM:
            return f"{self.done}/{self.total}"
        return f"{self.done / self.total:.0%}"

    def list_words(self, now_s: float) -> list[str]:
        """Return the amount, the rate where it is known, and the time that is left or was taken."""
        elapsed_s = (self.ended_s or now_s) - self.began_s
        words = [self.amount]

        if self.tokens and elapsed_s > 0:
            words.append(f"{self.tokens / elapsed_s:,.0f} tokens/s")

        left_s = self.left_s(now_s)
        if self.ended:
            words.append(f"took {write_duration(elapsed_s)}")
        elif left_s is not None:
            words.append(f"about {write_duration(left_s)} left")
        elif elapsed_s >= 1:
            words.append(f"{write_duration(elapsed_s)} so far")

        return words

    def left_s(self, now_s: float) -> float | None:
        """Return the seconds that are left at the pace so far; None where that says too little."""
        new, missing = self.done - self.first, self.total - self.done
        needed = 1
        if self.tokens:
            needed = max(1, min((self.total - self.first) // _KNOWN_SHARE, _KNOWN))

        if new < needed:
            return None
        return (now_s - self.began_s) * missing / new


class Tracks:
    """The stages of a run by label; what begins again after its end is a stage of its own."""

    def __init__(self) -> None:
        self._open: dict[str, Track] = {}

    def update(self, label: str, done: int, total: int, tokens: int) -> tuple[Track, bool]:
        """Return the track of a label, and whether it is a new one."""
        now_s = time.monotonic()
        track = self._open.get(label)
        is_new = track is None or done < track.done

        if track is None or is_new:
            track = self._open[label] = Track(label, now_s, done, done, total)

        track.update(done, total, tokens, now_s)
        return track, is_new


class _Words(bars.ProgressColumn):
    """What a track says of itself, at any moment."""

    def render(self, task: bars.Task) -> Text:
        track: Track = task.fields["track"]
        return Text("  ".join(track.list_words(time.monotonic())))


@contextmanager
def show_progress(console: Console, quiet: bool = False, keep: bool = True) -> Iterator[Progress]:
    """Yield a progress callback that draws bars on a terminal, and prints lines elsewhere.

    ``keep`` leaves the bars of ended stages.
    """
    if quiet:
        yield lambda label, done, total, tokens=0: None
    elif console.is_terminal:
        with make_bars(console) as shown:
            yield fill_bars(shown, keep)
    else:
        yield print_lines(console)


def make_bars(console: Console) -> bars.Progress:
    """Return bars that are not drawn yet."""
    columns = (
        bars.TextColumn("{task.description:<16}"),
        bars.BarColumn(_BAR_WIDTH),
        _Words(),
    )
    return bars.Progress(*columns, console=console)


def fill_bars(shown: bars.Progress, keep: bool) -> Progress:
    """Return a progress callback that fills bars; ``keep`` leaves those of ended stages."""
    tracks = Tracks()
    tasks: dict[int, bars.TaskID] = {}

    def draw(label: str, done: int, total: int, tokens: int = 0) -> None:
        track, is_new = tracks.update(label, done, total, tokens)
        if is_new:
            tasks[id(track)] = shown.add_task(label, total=total, track=track)
        if id(track) in tasks:
            shown.update(tasks[id(track)], completed=done, total=total)

        if track.ended and not keep and id(track) in tasks:
            shown.remove_task(tasks.pop(id(track)))

    return draw


def print_lines(console: Console) -> Progress:
    """Return a progress callback that prints a line now and then."""
    tracks = Tracks()
    printed_s: dict[str, float] = {}

    def advance(label: str, done: int, total: int, tokens: int = 0) -> None:
        track, is_new = tracks.update(label, done, total, tokens)
        now_s = time.monotonic()

        ends_now = track.ended and label in printed_s
        due = now_s - printed_s.get(label, now_s) >= LINE_EVERY_S
        if not (is_new or ends_now or due):
            return

        printed_s[label] = now_s
        if track.ended:
            del printed_s[label]
        line = f"{label} {', '.join(track.list_words(now_s))}"
        console.print(line, markup=False, soft_wrap=True)

    return advance


def write_duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"

    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"

    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"
