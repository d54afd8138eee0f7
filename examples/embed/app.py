"""Ask a bundle questions from an app of your own: no torch, text as it comes, and Ctrl-C stops one
answer.

    python examples/embed/app.py bundle/ "What is 12 times 34?"

Without a question it reads one a line from standard input. The thinking is dimmed on a terminal.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import racdeploy

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def main() -> int:
    """Answer the question on the command line, or those on standard input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder that racdeploy build wrote")
    parser.add_argument("question", nargs="?", help="default: one a line from standard input")
    parser.add_argument("--max-thinking-tokens", type=int, help="close the thinking after so many")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 uses every core")
    arguments = parser.parse_args()
    try:
        with racdeploy.load(arguments.bundle, threads=arguments.threads) as model:
            for question in [arguments.question] if arguments.question else _lines(sys.stdin):
                ask(model, question, arguments.max_thinking_tokens)
    except racdeploy.RacdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # while it waits for a question
        return 130
    return 0


def ask(model: racdeploy.Model, question: str, max_thinking_tokens: int | None) -> None:
    """Print the thinking and the answer as they come; Ctrl-C ends them early."""
    page = Page(colour=sys.stdout.isatty())
    with stopped_by_ctrl_c() as cancel:
        result = model.generate(
            question, max_thinking_tokens=max_thinking_tokens, on_text=page.write, cancel=cancel
        )
    page.finish()
    if result.finish_reason == "cancelled":
        print("(stopped)")
    elif result.state == "open":
        print(f"(no answer: the thinking did not end within {result.thinking_tokens} tokens)")
    elif result.finish_reason == "length":
        print("(the answer was cut at the token cap)")


class Page:
    """Text under a heading for each part, dimmed while the model thinks."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour
        self._part = ""

    def write(self, text: str, part: Literal["thinking", "answer"]) -> None:
        """Show a piece of text."""
        if part != self._part:
            self.finish()
            self._part = part
            print(f"{part.capitalize()}:")
            if self._colour and part == "thinking":
                print(DIM, end="")
        print(text, end="", flush=True)

    def finish(self) -> None:
        """End the part."""
        if self._part:
            print(PLAIN if self._colour else "")
        self._part = ""


@contextmanager
def stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets, instead of an exception in the middle of a token."""
    cancel = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: cancel.set())
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(stream: Iterable[str]) -> Iterator[str]:
    return (line.strip() for line in stream if line.strip())


if __name__ == "__main__":
    sys.exit(main())
