"""Splitting of completions into thinking and answer, by token ids and the end of the prompt.

R1 templates write the open tag into the prompt, Qwen3 generates it, and with thinking off it is in
the prompt already closed. Searching for both tags in the output text misses the first case and
scores a truncated thought as an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from racdeploy.engines.engine import Ids
from racdeploy.engines.sequence import count_partial_match, ends_with
from racdeploy.errors import ArtifactError
from racdeploy.results.answers import ThinkingOpening, ThinkingState
from racdeploy.runtime.template import PromptEncoder

PromptState = Literal["open", "closed", "none"]

KNOWN_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    # GPT-OSS: text in other channels between these two counts as thinking.
    (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
)
_ANSWERS = {"<|channel|>analysis<|message|>": "<|channel|>final<|message|>"}
"""Open tag → tag in front of an answer without a thought, which is not part of its text."""
_SPACES = frozenset(" \n\r\t▁ĠĊčĉ")  # as sentencepiece and byte-level vocabularies write them
_SPACE_BYTES = frozenset({"<0x09>", "<0x0A>", "<0x0D>", "<0x20>"})
_MAX_TAG_TOKENS = 256


@dataclass(frozen=True)
class ThinkingTags:
    """Token ids of the tags around a thought, and of white space after a tag in a prompt.

    ``answer_ids`` is a tag in front of an answer without a thought; empty for most models.
    """

    open_ids: Ids
    close_ids: Ids
    space_ids: frozenset[int] = frozenset()
    answer_ids: Ids = ()


@dataclass(frozen=True)
class SplitCompletion:
    """Thinking and answer of a completion.

    Args:
        thinking_ids: strictly between the tags; all thoughts of a reopened completion.
        answer_ids: after the last close tag, without end-of-sequence; empty if a thought is open.
        state: ``closed`` by the model; ``forced`` by the budget; ``open``: truncated inside a
            thought; ``absent``: no thought; ``reopened``: several thoughts, or one after the prompt
            had closed it.
        opening: start of the first thought: ``prefilled`` by the prompt, ``emitted`` by the model,
            ``implied`` by a close tag alone, or ``none``.
    """

    thinking_ids: Ids
    answer_ids: Ids
    state: ThinkingState
    opening: ThinkingOpening = "none"


class ThinkingScanner:
    """Incremental parser of thoughts in a completion.

    A close tag without an open tag means that the model omitted the open tag: everything before it
    is the thought. After a forced close tag, the model may write its own, which ``ids`` leave out.

    Args:
        is_forced: returns whether the first thought, from start to stop, was closed by the budget.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        tags: ThinkingTags,
        is_forced: Callable[[int, int], bool] = lambda start, stop: False,
    ) -> None:
        self.prompt_state = find_prompt_state(prompt_ids, tags)
        self.ids: list[int] = []
        self.is_thinking = self.prompt_state == "open"
        self.thoughts: list[tuple[int, int]] = []  # closed ones: start and stop in ids
        self.start = 0  # of the current thought or answer
        self.opening: ThinkingOpening = "prefilled" if self.is_thinking else "none"
        self.was_forced = False
        self._is_forced = is_forced
        self._tags = tags

    def feed(self, token: int) -> None:
        self.ids.append(token)
        close_ids = self._tags.close_ids

        if self.is_thinking:
            if self._ends_with(close_ids):
                self._close(self.start)
        elif self._ends_with(self._tags.open_ids):
            self.is_thinking = True
            self.start = len(self.ids)
            self._begin("emitted")
        elif self.was_forced and self._ends_with(close_ids):
            del self.ids[-len(close_ids) :]
        elif not self.thoughts and self.prompt_state == "none" and self._ends_with(close_ids):
            self._begin("implied")
            self._close(0)
        elif self._begins_answer() and len(self.ids) == len(self._tags.answer_ids):
            self.start = len(self.ids)

    def count_held_back(self) -> int:
        """Return the number of last tokens that may be the start of a tag."""
        tags = self._tags.open_ids, self._tags.close_ids
        begun = max(count_partial_match(self.ids, tag, self.start) for tag in tags)
        return max(begun, len(self.ids)) if self._begins_answer() else begun

    def _begins_answer(self) -> bool:
        """Return True if all ids so far are a prefix of the tag of an answer without a thought."""
        tag = self._tags.answer_ids[: len(self.ids)]
        return not self.is_thinking and self.start == 0 and list(tag) == self.ids != []

    def _begin(self, opening: ThinkingOpening) -> None:
        if self.opening == "none":
            self.opening = opening

    def _close(self, start: int) -> None:
        stop = len(self.ids) - len(self._tags.close_ids)
        self.was_forced = self.was_forced or (not self.thoughts and self._is_forced(start, stop))
        self.thoughts.append((start, stop))
        self.is_thinking = False
        self.start = len(self.ids)

    def _ends_with(self, wanted: Sequence[int]) -> bool:
        return ends_with(self.ids, wanted, self.start)


def split_completion(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    tags: ThinkingTags | None,
    *,
    eos_ids: Collection[int],
    forced_at: int | None = None,
) -> SplitCompletion:
    """Split a completion into thinking and answer; trailing ``eos_ids`` are removed.

    Args:
        tags: None for a model that does not think.
        forced_at: see :class:`racdeploy.engines.engine.Completion`.
    """
    ids = list(completion_ids)
    while ids and ids[-1] in eos_ids:
        ids.pop()
    if tags is None:
        return SplitCompletion((), tuple(ids), "absent")

    # Forced tokens may start with the closing text, which is part of the thought.
    at = -1 if forced_at is None else forced_at
    scanner = ThinkingScanner(prompt_ids, tags, lambda start, stop: start <= at <= stop)
    for token in ids:
        scanner.feed(token)

    spans = list(scanner.thoughts)
    ids = scanner.ids
    answer_ids = ids[scanner.start :]
    if scanner.is_thinking:
        stop = len(ids)
        if not spans and forced_at is not None:
            stop = forced_at  # the token limit truncated the forced tag, which is not thinking
        spans.append((scanner.start, stop))
        answer_ids = []

    thinking_ids = [token for start, stop in spans for token in ids[start:stop]]
    state = _state(scanner, spans)
    return SplitCompletion(tuple(thinking_ids), tuple(answer_ids), state, scanner.opening)


def _state(scanner: ThinkingScanner, spans: Sequence[tuple[int, int]]) -> ThinkingState:
    if not spans:
        return "absent"
    if scanner.is_thinking:
        return "open"
    if len(spans) > 1 or scanner.prompt_state == "closed":
        return "reopened"
    return "forced" if scanner.was_forced else "closed"


def find_prompt_state(prompt_ids: Sequence[int], tags: ThinkingTags) -> PromptState:
    """Return ``open`` or ``closed`` if the prompt ends with such a tag, else ``none``.

    White space after the tag is skipped. Tags elsewhere do not count: a user may type them.
    """
    ids = list(prompt_ids)
    while True:
        if ends_with(ids, tags.open_ids):
            return "open"
        if ends_with(ids, tags.close_ids):
            return "closed"
        if not ids or ids.pop() not in tags.space_ids:
            return "none"


def find_tags(encoder: PromptEncoder) -> ThinkingTags | None:
    """Return the tags of a model, or None if it does not think; see :func:`find_tag_names`."""
    return encode_tags(encoder, *(find_tag_names(encoder) or (None, None)))


def find_tag_names(encoder: PromptEncoder) -> tuple[str, str] | None:
    """Return open and close tag of a model as texts, or None if it does not think.

    A known pair counts if both tags are single tokens, or if the chat template contains one of
    them; a pair with both properties is preferred.
    """
    texts = [tag for tags in KNOWN_TAGS for tag in tags]
    ids = dict(zip(texts, encoder.tokenizer.tokens_to_ids(texts), strict=True))

    def rank(tags: tuple[str, str]) -> int:
        is_written = any(tag in encoder.template.source for tag in tags)
        are_tokens = all(ids[tag] is not None for tag in tags)
        return 2 * are_tokens + is_written

    best = max(KNOWN_TAGS, key=rank)  # the first of equal ones
    return best if rank(best) else None


def encode_tags(
    encoder: PromptEncoder, open_tag: str | None, close_tag: str | None
) -> ThinkingTags | None:
    """Return the ids of two tags and of white space; None for a model without tags.

    A tag of several tokens is matched as it is tokenized alone: it is missed if the tokenizer
    merges it with neighboring text.

    Raises:
        ArtifactError: a tag has no ids or too many, or both have the same.
    """
    if open_tag is None or close_tag is None:
        return None

    texts = [open_tag, close_tag, _ANSWERS.get(open_tag, "")]
    open_ids, close_ids, answer_ids = map(tuple, encoder.tokenizer.encode_batch(texts))

    sizes = len(open_ids), len(close_ids)
    if open_ids == close_ids or min(sizes) == 0 or max(sizes) > _MAX_TAG_TOKENS:
        raise ArtifactError(
            "tags-not-encodable",
            f"the tokenizer cannot write the thinking tags {open_tag!r} and {close_tag!r}: "
            f"it gives ids {list(open_ids)} and {list(close_ids)}",
            remedy="use the tokenizer.json that the model was trained with",
        )

    space_ids = encoder.tokenizer.blank_ids(_SPACES, _SPACE_BYTES)
    return ThinkingTags(open_ids, close_ids, frozenset(space_ids), answer_ids)
