"""Streaming of an answer: thinking on stderr, in full or as a count; the answer on stdout."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Literal

from rich.control import Control
from rich.segment import ControlType

from racdeploy.cli.console import err
from racdeploy.errors import UsageError
from racdeploy.files.unprintable import drop_unprintable

if TYPE_CHECKING:
    from racdeploy.runtime.model import GenerationResult

_EVERY_S = 0.1  # interval of updates of the token count


class AnswerStream:
    """Prints one answer while it is generated, without the white space around its parts.

    Args:
        show_thinking: print the thinking on stderr; otherwise a terminal shows its token count
            while it lasts.
        show_answer: print the answer on stdout.
    """

    def __init__(self, show_thinking: bool = False, show_answer: bool = True) -> None:
        from racdeploy.runtime.text import PartStripper

        self._show_thinking = show_thinking
        self._show_answer = show_answer
        self._is_terminal = sys.stdout.isatty()
        self._part = ""
        self._stripper = PartStripper()
        self._tokens = 0
        self._counted_at = float("-inf")

    def write(self, text: str, part: Literal["thinking", "answer"]) -> None:
        """Show a piece of text."""
        if part != self._part:
            self._end_part()
            clear_line()
            self._part = part

        if part == "answer":
            if self._show_answer:
                seen = self._stripper.feed(text)
                sys.stdout.write(drop_unprintable(seen) if self._is_terminal else seen)
                sys.stdout.flush()
        elif self._show_thinking:
            seen = drop_unprintable(self._stripper.feed(text))
            err.print(seen, style="dim", end="", markup=False, soft_wrap=True)
        else:
            self._count()

    def finish(self) -> None:
        """End the current line on the screen."""
        self._end_part()
        clear_line()

    def _count(self) -> None:
        """Show the number of thinking tokens; one that ends inside a character is not counted."""
        self._tokens += 1
        now = time.monotonic()
        if now - self._counted_at < _EVERY_S:
            return

        self._counted_at = now
        show_line(f"thinking … {self._tokens:,} token{'s' * (self._tokens != 1)}")

    def _end_part(self) -> None:
        if self._stripper.has_begun:
            (err.file if self._part == "thinking" else sys.stdout).write("\n")
            sys.stdout.flush()

        self._part = ""
        self._stripper.restart()


def show_line(text: str) -> None:
    """Show a status line on a terminal, which the next line replaces."""
    if err.is_terminal and not err.is_dumb_terminal:
        clear_line()
        err.print(text, style="dim", end="", markup=False, no_wrap=True, overflow="ellipsis")


def clear_line() -> None:
    """Clear the status line, if stderr is a terminal that can."""
    if err.is_terminal and not err.is_dumb_terminal:
        err.control(Control((ControlType.CARRIAGE_RETURN,), (ControlType.ERASE_IN_LINE, 2)))


def describe_cut(result: GenerationResult) -> str:
    """Return the reason why an answer is missing or incomplete, or an empty string."""
    if result.finish_reason == "cancelled":
        return "stopped" if result.answer else "stopped before there was an answer"
    if result.state == "open":
        return f"the thinking did not end within {result.thinking_tokens:,} tokens"
    if result.finish_reason == "length":
        return f"the answer was cut after {result.answer_tokens:,} tokens"
    return ""


@contextmanager
def stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets, so that the answer so far is kept.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """
    cancel = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)


def check_question(text: str) -> str:
    """Return a question without surrounding white space; raise UsageError if it is no text."""
    question = text.strip()
    if not question:
        raise UsageError(
            "no-question", "the question is empty", remedy='racdeploy run bundle "What is 2 + 2?"'
        )

    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            "text-not-utf8", f"{question!r:.200} is not text: {error}", remedy="give it in UTF-8"
        ) from error
    return question
