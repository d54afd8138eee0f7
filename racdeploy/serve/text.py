"""Text of a stream as the client receives it: stripped, and ended by a stop string.

The joined pieces equal the text of a response without streaming.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Generic, TypeVar

from racdeploy.runtime import AsyncTextStream, TextChunk
from racdeploy.runtime.text import PartStripper

R = TypeVar("R")


class VisibleText(Generic[R]):
    """Filter of a stream for the client; the generation is stopped at a stop string.

    Args:
        stops: strings that end an answer; not searched in the thinking.
        strip: remove white space at both ends of thinking and answer.
    """

    def __init__(self, stream: AsyncTextStream[R], stops: Sequence[str], *, strip: bool) -> None:
        self.is_stopped = False
        self._stream = stream
        self._stops = stops
        self._stripper = PartStripper() if strip else None
        self._kind = "thinking"
        self._held = ""  # possible start of a stop string

    async def pieces(self) -> AsyncIterator[TextChunk]:
        """Yield pieces to the end of the stream or the first stop string."""
        async for text, kind in self._stream:
            if kind != self._kind:
                if rest := self._end_part():
                    yield TextChunk(rest, "answer" if kind == "thinking" else "thinking")
                self._kind = kind

            if shown := self._read(text):
                yield TextChunk(shown, kind)

            if self.is_stopped:
                await self._stream.aclose()
                return

        if rest := self._end_part():
            yield TextChunk(rest, "answer" if self._kind == "answer" else "thinking")

    def cut(self, answer: str) -> str:
        """Return an answer up to its first stop string."""
        shown = answer[: self._find_stop(answer)]
        return shown.strip() if self._stripper else shown

    def _find_stop(self, text: str) -> int | None:
        """Return the index of the first stop string, or None."""
        starts = [text.find(stop) for stop in self._stops]
        return min((start for start in starts if start >= 0), default=None)

    def _read(self, text: str) -> str:
        """Return the text that can be shown now; hold the rest back."""
        self._held += text
        shown = len(self._held)

        if self._kind == "answer":
            stop = self._find_stop(self._held)
            if stop is not None:
                self.is_stopped = True
                shown = stop
            else:
                shown -= max(
                    (_count_possible_start(self._held, each) for each in self._stops), default=0
                )

        taken, self._held = self._held[:shown], self._held[shown:]
        return self._stripper.feed(taken) if self._stripper else taken

    def _end_part(self) -> str:
        """Return the held text at the end of a part, where no stop string can follow."""
        rest, self._held = self._held, ""
        if self._stripper:
            rest = self._stripper.feed(rest)
            self._stripper.restart()
        return rest


def _count_possible_start(text: str, stop: str) -> int:
    """Return the number of last characters that may start a stop string."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
