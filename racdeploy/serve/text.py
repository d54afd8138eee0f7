"""Text of a stream as the client receives it: stripped, ended by a stop string, without calls.

The joined pieces equal the text of a response without streaming.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

from racdeploy.runtime import AsyncTextStream, TextChunk
from racdeploy.runtime.text import PartStripper, TextKind
from racdeploy.serve.calls import CALL_TAG, CallObject, read_calls


class VisibleText:
    """Filter of a stream for the client; the generation is stopped at a stop string.

    ``texts`` has all that was shown, and ``calls`` the calls of tools in OpenAI's form, at the end.

    Args:
        stops: strings that end an answer; not searched in the thinking.
        strip: remove white space at both ends of thinking and answer.
        tools: names of the tools that an answer may call.
    """

    def __init__(
        self,
        stream: AsyncTextStream[Any],
        stops: Sequence[str],
        *,
        strip: bool,
        tools: Collection[str] = (),
    ) -> None:
        self.is_stopped = False
        self.texts: dict[TextKind, str] = {"thinking": "", "answer": ""}
        self.calls: list[CallObject] = []
        self._tools = tools
        self._marks = [*stops, CALL_TAG] if tools else stops
        self._stream = stream
        self._stops = stops
        self._stripper = PartStripper() if strip else None
        self._kind: TextKind = "thinking"
        self._held = ""  # possible start of a stop string or call, or a call

    async def pieces(self) -> AsyncIterator[TextChunk]:
        """Yield pieces to the end of the stream or the first stop string."""
        async for text, kind in self._stream:
            if kind != self._kind:
                if rest := self._end_part():
                    yield TextChunk(rest, self._kind)
                self._kind = kind

            if shown := self._read(text):
                yield TextChunk(shown, kind)

            if self.is_stopped:
                await self._stream.aclose()
                break

        if rest := self._end_part():
            yield TextChunk(rest, self._kind)

    def _read(self, text: str) -> str:
        """Return the text that can be shown now; hold the rest back."""
        self._held += text
        shown = len(self._held)

        if self._kind == "answer":
            stops = [self._held.find(stop) for stop in self._stops if stop in self._held]
            self.is_stopped = bool(stops)
            self._held = self._held[: min(stops, default=None)]
            shown = min(map(self._find, self._marks), default=len(self._held))
            if self._tools and not self.texts["answer"] and self._held.lstrip().startswith("{"):
                shown = 0

        taken, self._held = self._held[:shown], self._held[shown:]
        return self._show(taken)

    def _find(self, text: str) -> int:
        """Return the index of a text in what is held, or of what may be its beginning."""
        for index in range(len(self._held)):
            if text.startswith(self._held[index : index + len(text)]):
                return index
        return len(self._held)

    def _end_part(self) -> str:
        """Return the held text at the end of a part, where nothing can follow."""
        if self._kind == "answer":
            self.calls = read_calls(self._held, self._tools)
        rest = "" if self.calls else self._show(self._held)
        self._held = ""
        if self._stripper:
            self._stripper.restart()
        return rest

    def _show(self, text: str) -> str:
        shown = self._stripper.feed(text) if self._stripper else text
        self.texts[self._kind] += shown
        return shown
