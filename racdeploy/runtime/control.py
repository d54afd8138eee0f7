"""Thoughts under control: budgets with a last sentence, and tokens that lengthen a thought.

Source: Lotfi et al., Quantized Reasoning Models Think They Need to Think Longer, but They Do Not,
arXiv 2606.00206: a fixed penalty on the logits of words of hesitation.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Sequence

from racdeploy.engines.engine import ThinkingBudget
from racdeploy.errors import UsageError
from racdeploy.manifest import ThinkingControl
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, prompt_state

NO_CONTROL = ThinkingControl()
_ROUND_A_WORD = string.whitespace + string.punctuation + "\u2026"


def make_budget(
    encoder: PromptEncoder,
    tags: ThinkingTags | None,
    prompt_ids: Sequence[int],
    max_tokens: int | None,
    control: ThinkingControl = NO_CONTROL,
) -> ThinkingBudget | None:
    """Return what an engine does about the thinking behind a prompt; None where that is nothing."""
    if tags is None or (max_tokens is None and not control.hesitation_penalty):
        return None

    return ThinkingBudget(
        close_ids=tags.close_ids,
        open_ids=tags.open_ids,
        max_tokens=max_tokens,
        starts_open=prompt_state(prompt_ids, tags) == "open",
        closing_ids=tuple(encoder.encode_text(control.closing)),
        close_bias=control.close_bias,
        hesitation_ids=control.hesitation_ids,
        hesitation_penalty=control.hesitation_penalty,
    )


def find_hesitation(encoder: PromptEncoder, words: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the ids of every token that is one of some words, by the word.

    A token counts whatever its case and with white space and punctuation round it, as `` wait,``.
    A word that the tokenizer only writes in pieces has none.
    """
    found: dict[str, list[int]] = {word: [] for word in words}
    by_form = {word.casefold(): word for word in words}

    tokens = sorted(encoder.tokenizer.get_vocab(with_added_tokens=False).values())
    texts = encoder.tokenizer.decode_batch([[token] for token in tokens])

    for token, written in zip(tokens, texts, strict=True):
        text = written.strip(_ROUND_A_WORD).casefold()
        if text in by_form:
            found[by_form[text]].append(token)

    return {word: tuple(ids) for word, ids in found.items()}


def check_closing(encoder: PromptEncoder, tags: ThinkingTags, closing: str) -> None:
    """Refuse a last sentence that would end the thought itself, or begin another."""
    ids = encoder.encode_text(closing)
    for tag_ids in (tags.close_ids, tags.open_ids):
        tag = encoder.decode(tag_ids)
        if tag in encoder.decode(ids):
            raise UsageError(
                "tag-in-closing-text",
                f"the closing text of the thinking holds {tag}",
                remedy="leave the tag out of runtime.thinking.closing: it is added",
            )


def describe_control(max_tokens: int | None, control: ThinkingControl) -> str:
    """Return what is done about the thinking, in words; empty where nothing is."""
    done = []
    if max_tokens is not None:
        done.append(f"it ends after {max_tokens:,} tokens")
        if control.closing:
            done.append(f"with {control.closing.strip()!r}")
        if control.close_bias:
            done.append(f"its end gains up to {control.close_bias:g} logits before that")

    if control.hesitation_penalty and control.hesitation_ids:
        words = ", ".join(word for word, ids in control.hesitation.items() if ids)
        done.append(f"{words} lose {control.hesitation_penalty:g} logits")

    return "; ".join(done)
