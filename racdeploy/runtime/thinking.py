"""Split a completion into thinking and answer, by token ids and the tail of the prompt.

R1 templates write the open tag into the prompt, Qwen3 generates it, and with thinking turned off it
is in the prompt already closed; looking for both tags in the output text misses the first case and
scores a thought that was cut as an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from racdeploy.engines.engine import Ids
from racdeploy.engines.sequence import count_begun, ends_with
from racdeploy.errors import ArtifactError
from racdeploy.results.answers import ThinkingOpening, ThinkingState
from racdeploy.runtime.template import PromptEncoder

PromptState = Literal["open", "closed", "none"]

TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    # GPT-OSS: what is said in between, in further channels, counts as thinking.
    (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
)
_ANSWERS = {"<|channel|>analysis<|message|>": "<|channel|>final<|message|>"}
"""Open tag → what an answer without a thought begins with, where that is no part of its text."""
_SPACES = frozenset(" \n\r\t▁ĠĊčĉ")  # as sentencepiece and byte-level vocabularies write them
_SPACE_BYTES = frozenset({"<0x09>", "<0x0A>", "<0x0D>", "<0x20>"})


@dataclass(frozen=True)
class ThinkingTags:
    """Token ids of the tags round a thought, and of white space behind a tag in a prompt.

    ``answer_ids`` are those of a tag in front of an answer without a thought, where there is one.
    """

    open_ids: Ids
    close_ids: Ids
    space_ids: frozenset[int] = frozenset()
    answer_ids: Ids = ()


@dataclass(frozen=True)
class Split:
    """A completion in parts.

    Args:
        thinking_ids: strictly between the tags; of a reopened completion, all its thoughts.
        answer_ids: after the last close tag, without end-of-sequence; empty while a thought is
            open.
        state: ``closed`` by the model; ``forced`` by the budget; ``open``: cut inside a thought,
            the first or a later one; ``absent``: the whole completion is the answer; ``reopened``:
            more than one thought, or one although the prompt had closed it.
        opening: where the first thought began: ``prefilled`` by the prompt, ``emitted`` by the
            model, ``implied`` by a close tag alone, or ``none``.
    """

    thinking_ids: Ids
    answer_ids: Ids
    state: ThinkingState
    opening: ThinkingOpening = "none"


class Scanner:
    """Follow a completion token by token.

    A close tag without any open tag before it means that the model left out the open tag:
    everything before it was the thought.
    """

    def __init__(self, prompt_ids: Sequence[int], tags: ThinkingTags) -> None:
        self.prompt_state = prompt_state(prompt_ids, tags)
        self.ids: list[int] = []
        self.inside = self.prompt_state == "open"
        self.thoughts: list[tuple[int, int]] = []  # closed ones: start and stop in ids
        self.start = 0  # of the thought or answer we are in
        self.opening: ThinkingOpening = "prefilled" if self.inside else "none"
        self._tags = tags

    def feed(self, token: int) -> None:
        self.ids.append(token)
        close_ids = self._tags.close_ids

        if self.inside:
            if self._ends_with(close_ids):
                self._close(self.start)
        elif self._ends_with(self._tags.open_ids):
            self.inside = True
            self.start = len(self.ids)
            self._begin("emitted")
        elif not self.thoughts and self.prompt_state == "none" and self._ends_with(close_ids):
            self._begin("implied")
            self._close(0)
        elif self._begins_answer() and len(self.ids) == len(self._tags.answer_ids):
            self.start = len(self.ids)

    def count_held_back(self) -> int:
        """Return how many of the last tokens may be the beginning of a tag."""
        wanted = self._tags.close_ids if self.inside else self._tags.open_ids
        begun = count_begun(self.ids, wanted, self.start)
        return max(begun, len(self.ids)) if self._begins_answer() else begun

    def _begins_answer(self) -> bool:
        """Return whether all so far begins the tag of an answer without a thought, or is it."""
        tag = self._tags.answer_ids[: len(self.ids)]
        return not self.inside and self.start == 0 and list(tag) == self.ids != []

    def _begin(self, opening: ThinkingOpening) -> None:
        if self.opening == "none":
            self.opening = opening

    def _close(self, start: int) -> None:
        stop = len(self.ids) - len(self._tags.close_ids)
        self.thoughts.append((start, stop))
        self.inside = False
        self.start = len(self.ids)

    def _ends_with(self, wanted: Sequence[int]) -> bool:
        return ends_with(self.ids, wanted, self.start)


def split(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    tags: ThinkingTags | None,
    *,
    eos_ids: Collection[int],
    forced_at: int | None = None,
) -> Split:
    """Split a completion into thinking and answer; ``eos_ids`` are stripped from its end.

    Args:
        tags: None for a model that does not think.
        forced_at: see :class:`racdeploy.engines.engine.Completion`.
    """
    ids = list(completion_ids)
    while ids and ids[-1] in eos_ids:
        ids.pop()
    if tags is None:
        return Split((), tuple(ids), "absent")

    scanner = Scanner(prompt_ids, tags)

    for token in ids:
        scanner.feed(token)

    spans = list(scanner.thoughts)
    answer_ids = ids[scanner.start :]
    if scanner.inside:
        stop = len(ids)
        if not spans and forced_at is not None:
            stop = forced_at  # the cap cut the forced tag short: its tokens are no thinking
        spans.append((scanner.start, stop))
        answer_ids = []

    thinking_ids = [token for start, stop in spans for token in ids[start:stop]]
    state = _state(scanner, spans, forced_at)
    return Split(tuple(thinking_ids), tuple(answer_ids), state, scanner.opening)


def _state(
    scanner: Scanner, spans: Sequence[tuple[int, int]], forced_at: int | None
) -> ThinkingState:
    if not spans:
        return "absent"
    if scanner.inside:
        return "open"
    if len(spans) > 1 or scanner.prompt_state == "closed":
        return "reopened"
    # What was forced may begin with a last sentence, which is a part of the thought.
    start, stop = spans[0]
    return "forced" if forced_at is not None and start <= forced_at <= stop else "closed"


def prompt_state(prompt_ids: Sequence[int], tags: ThinkingTags) -> PromptState:
    """Return what the prompt ends with, white space aside: an open tag, a close tag, or neither.

    Only the tail decides: a user may write tags in a question.
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
    """Return the tags of a model, or None where it does not think; see :func:`find_tag_names`."""
    names = find_tag_names(encoder)
    return tags_of(encoder, *names) if names else None


def find_tag_names(encoder: PromptEncoder) -> tuple[str, str] | None:
    """Return the texts of a model's tags.

    A known pair counts if the chat template writes it, or if both tags are single tokens; a pair
    for which both are true comes first.
    """
    texts = [tag for tags in TAGS for tag in tags]
    ids = dict(zip(texts, encoder.tokenizer.tokens_to_ids(texts), strict=True))

    def rank(tags: tuple[str, str]) -> int:
        is_written = any(tag in encoder.template.source for tag in tags)
        are_tokens = all(ids[tag] is not None for tag in tags)
        return 2 * are_tokens + is_written

    best = max(TAGS, key=rank)  # the first of equal ones
    return best if rank(best) else None


def tags_of(encoder: PromptEncoder, open_tag: str, close_tag: str) -> ThinkingTags:
    """Return the ids of two tags and of white space; it is an error if a tag has none.

    A tag of several tokens is looked for as it is tokenized alone; a tokenizer that merges it with
    its neighbours hides it.
    """
    texts = [open_tag, close_tag, _ANSWERS.get(open_tag, "")]
    open_ids, close_ids, answer_ids = map(tuple, encoder.tokenizer.encode_batch(texts))

    if not open_ids or not close_ids or open_ids == close_ids:
        raise ArtifactError(
            "tags-not-encodable",
            f"the tokenizer cannot write the thinking tags {open_tag!r} and {close_tag!r}: "
            f"it gives ids {list(open_ids)} and {list(close_ids)}",
            remedy="use the tokenizer.json that the model was trained with",
        )

    space_ids = encoder.tokenizer.blank_ids(_SPACES, _SPACE_BYTES)
    return ThinkingTags(open_ids, close_ids, frozenset(space_ids), answer_ids)
