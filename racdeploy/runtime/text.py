"""Streaming decoder from token ids to text: without tags, in whole characters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingScanner, ThinkingTags

TextKind = Literal["thinking", "answer"]
OnText = Callable[[str, TextKind], None]
"""Callback for each piece of text and its kind."""

_CHARACTER_TOKENS = 16  # with those of a tag that did not follow; a character has 4 at most
_NO_TAGS = ThinkingTags((-1,), (-1,))  # ids that never occur


class PartStripper:
    """Removes the white space at both ends of a part, which comes in pieces."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin the next part."""
        self.has_begun = False  # True once non-white text of this part is shown
        self._held = ""  # white space that may be the last

    def feed(self, text: str) -> str:
        """Return the text that can be shown now."""
        text = self._held + text
        if not self.has_begun:
            text = text.lstrip()

        shown = text.rstrip()
        self._held = text[len(shown) :]
        self.has_begun = self.has_begun or bool(shown)
        return shown


class StreamDecoder:
    """Decoder of the new ids of a completion into text.

    Args:
        tags: None for a model that does not think, or to treat tags as text.
        eos_ids: end-of-sequence ids, which are not decoded.
        on_text: receives the text.
        max_thinking_tokens: after which the close tag is forced; None never forces it.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        prompt_ids: Sequence[int],
        tags: ThinkingTags | None,
        eos_ids: Collection[int],
        on_text: OnText,
        max_thinking_tokens: int | None = None,
    ) -> None:
        self._tags = tags or _NO_TAGS
        self._encoder = encoder
        self._eos_ids = eos_ids
        self._on_text = on_text
        most = max_thinking_tokens
        self._scanner = ThinkingScanner(
            prompt_ids, self._tags, lambda start, stop: most is not None and stop - start >= most
        )

        # Ids from _prefix to _read are shown already; decoding them again gives the next ids their
        # context, as many tokenizers decode a token differently at the start of a text.
        self._prefix = 0
        self._read = 0

    def feed(self, index: int, ids: Sequence[int], ended: object) -> None:
        """Process new ids of the only sequence of a call; see :data:`~.engine.OnTokens`."""
        scanner = self._scanner
        for token in ids:
            if token in self._eos_ids:
                continue
            inside = scanner.is_thinking
            start = scanner.start
            scanner.feed(token)

            if scanner.start == start:
                self._show(len(scanner.ids) - scanner.count_held_back(), inside)
                continue

            # A tag ended: show the text before it. Before an implied open tag it is shown already.
            if scanner.is_thinking or inside:
                tag = self._tags.close_ids if inside else self._tags.open_ids
                self._show(len(scanner.ids) - len(tag), inside, whole=True)

            self._prefix = self._read = scanner.start

    def finish(self) -> None:
        """Show the rest, held back as the possible start of a tag or part of a character."""
        self._show(len(self._scanner.ids), self._scanner.is_thinking, whole=True)

    def _show(self, stop: int, inside: bool, whole: bool = False) -> None:
        if stop <= self._read:
            return

        ids = self._scanner.ids
        pieces = ids[self._prefix : stop], ids[self._prefix : self._read]
        text, shown = self._encoder.tokenizer.decode_batch(pieces)

        is_partial = text.endswith("\ufffd") and stop - self._read < _CHARACTER_TOKENS
        if is_partial and not whole:  # in the middle of a character
            return

        self._prefix = self._read
        self._read = stop
        if new_text := text[len(shown) :]:
            self._on_text(new_text, "thinking" if inside else "answer")
