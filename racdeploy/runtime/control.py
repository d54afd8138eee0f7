"""Control of the thinking: budgets with a closing text, and a penalty on hesitation.

Source: Lotfi et al., Quantized Reasoning Models Think They Need to Think Longer, but They Do Not,
arXiv 2606.00206: a fixed penalty on the logits of hesitation words.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Sequence

from racdeploy.engines.engine import ThinkingBudget
from racdeploy.errors import UsageError
from racdeploy.manifest import ThinkingControl
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, find_prompt_state

NO_CONTROL = ThinkingControl()
_AROUND_WORD = string.whitespace + string.punctuation + "\u2026"


def make_budget(
    encoder: PromptEncoder,
    tags: ThinkingTags | None,
    prompt_ids: Sequence[int],
    max_tokens: int | None,
    control: ThinkingControl,
) -> ThinkingBudget | None:
    """Return the engine's thinking control for a prompt; None if nothing is controlled.

    Args:
        tags: None for a model that does not think.
        max_tokens: thinking tokens after which the close tag is forced; None sets no limit.
    """
    if tags is None or (max_tokens is None and not control.hesitation_penalty):
        return None

    return ThinkingBudget(
        close_ids=tags.close_ids,
        open_ids=tags.open_ids,
        max_tokens=max_tokens,
        starts_open=find_prompt_state(prompt_ids, tags) == "open",
        closing_message_ids=tuple(encoder.encode_text(control.closing)),
        hesitation_ids=control.hesitation_ids,
        hesitation_penalty=control.hesitation_penalty,
    )


def find_hesitation_ids(
    encoder: PromptEncoder, words: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Return, for each word, the ids of all tokens that spell it.

    Case, white space and punctuation around it are ignored, as in `` wait,``. A word that the
    tokenizer always splits has no ids.
    """
    ids_by_word: dict[str, list[int]] = {word: [] for word in words}
    word_by_form = {word.casefold(): word for word in words}

    # Decode every token: the vocabulary spells spaces and bytes in its own alphabet.
    tokens = sorted(encoder.tokenizer.get_vocab(with_added_tokens=False).values())
    texts = encoder.tokenizer.decode_batch([[token] for token in tokens])

    for token, written in zip(tokens, texts, strict=True):
        text = written.strip(_AROUND_WORD).casefold()
        if text in word_by_form:
            ids_by_word[word_by_form[text]].append(token)

    return {word: tuple(ids) for word, ids in ids_by_word.items()}


def check_closing_text(encoder: PromptEncoder, tags: ThinkingTags, closing: str) -> None:
    """Raise UsageError if a closing text contains a tag: it would close or open a thought."""
    ids = encoder.encode_text(closing)
    for tag_ids in (tags.close_ids, tags.open_ids):
        tag = encoder.decode(tag_ids)
        if tag in encoder.decode(ids):
            raise UsageError(
                "tag-in-closing-text",
                f"the closing text of the thinking contains {tag}",
                remedy="leave the tag out of runtime.thinking.closing: it is added",
            )


def describe_control(max_tokens: int | None, control: ThinkingControl) -> str:
    """Return a description of the thinking control; empty if there is none."""
    done = []
    if max_tokens is not None:
        done.append(f"it ends after {max_tokens:,} tokens")
        if control.closing:
            done.append(f"with {control.closing.strip()!r}")

    if control.hesitation_penalty and control.hesitation_ids:
        words = ", ".join(word for word, ids in control.hesitation.items() if ids)
        done.append(f"{words} lose {control.hesitation_penalty:g} logits")

    return "; ".join(done)
