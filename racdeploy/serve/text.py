"""What of a stream a client sees: no white space round a part, and nothing from a stop string on.

The pieces put together are what an answer without a stream has.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Generic, TypeVar

from racdeploy.runtime import AsyncTextStream, Piece

R = TypeVar("R")


class ShownText(Generic[R]):
    """Pieces of a stream as a client sees them; the generation ends at a stop string.

    Args:
        stops: strings that end an answer; those in the thinking do not count.
        strip: leave out white space at both ends of each part.
    """

    def __init__(self, stream: AsyncTextStream[R], stops: Sequence[str], *, strip: bool) -> None:
        self.is_stopped = False
        self._stream = stream
        self._stops = stops
        self._strip = strip
        self._kind = "thinking"
        self._held = ""  # may be the beginning of a stop string, or white space at the end
        self._has_begun = False  # anything but white space of this part is shown

    async def pieces(self) -> AsyncIterator[Piece]:
        """Read the stream to its end, or to the first stop string."""
        async for text, kind in self._stream:
            if kind != self._kind:
                if rest := self._end_part():
                    yield Piece(rest, "answer" if kind == "thinking" else "thinking")
                self._kind = kind

            if shown := self._read(text):
                yield Piece(shown, kind)

            if self.is_stopped:
                await self._stream.aclose()
                return

        if rest := self._end_part():
            yield Piece(rest, "answer" if self._kind == "answer" else "thinking")

    def cut(self, answer: str) -> str:
        """Return a whole answer up to the first stop string."""
        shown = answer[: self._find_stop(answer)]
        return shown.strip() if self._strip else shown

    def _find_stop(self, text: str) -> int | None:
        """Return where the first stop string begins, None without one."""
        found = [text.find(stop) for stop in self._stops]
        return min((start for start in found if start >= 0), default=None)

    def _read(self, text: str) -> str:
        """Return what of the text so far can be shown."""
        self._held += text
        shown = len(self._held)

        if self._kind == "answer":
            stop = self._find_stop(self._held)
            if stop is not None:
                self.is_stopped = True
                shown = stop
            else:
                shown -= max((_count_begun(self._held, each) for each in self._stops), default=0)

        if not self._strip:
            return self._take(shown)

        if not self._has_begun:
            spaces = len(self._held) - len(self._held.lstrip())
            self._take(min(spaces, shown))
            shown = max(0, shown - spaces)

        taken = self._take(len(self._held[:shown].rstrip()))
        self._has_begun = self._has_begun or bool(taken)
        return taken

    def _end_part(self) -> str:
        """Return the rest of a part: what looked like the beginning of a stop string."""
        rest = self._held.rstrip() if self._strip else self._held
        self._held = ""
        self._has_begun = False
        return rest

    def _take(self, count: int) -> str:
        taken = self._held[:count]
        self._held = self._held[count:]
        return taken


def _count_begun(text: str, stop: str) -> int:
    """Return how many of the last characters may be the beginning of a stop string."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
