"""Comparison of a tokenizer with the same one with fewer tokens, on the same texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from racdeploy.errors import GateError
from racdeploy.models.renumbering import OldIds
from racdeploy.runtime.template import PromptEncoder


@dataclass(frozen=True)
class TokenizationComparison:
    """Counts over some texts: tokens in both vocabularies, and equal tokens."""

    before: int
    after: int
    same: int

    def describe(self, subject: str) -> str:
        """Return a sentence for the report on how many more tokens the texts need."""
        times = self.after / max(1, self.before)
        return (
            f"{subject} {times:.4f} times as many tokens in the cut vocabulary as before; "
            "thinking lengths are counted in each model's own tokens"
        )


def compare_tokenization(
    dense: PromptEncoder, cut: PromptEncoder, old_ids: OldIds, texts: Iterable[str]
) -> TokenizationComparison:
    """Tokenize texts with both vocabularies; both must restore the same text.

    Args:
        old_ids: the dense id of each token of the cut vocabulary.

    Raises:
        GateError: the cut tokenizer restores another text than the dense one.
    """
    before = after = same = 0

    for text in texts:
        dense_ids = dense.encode_text(text)
        cut_ids = cut.encode_text(text)
        restored = cut.decode(cut_ids)
        if restored != dense.decode(dense_ids):
            raise GateError(
                "text-not-restored",
                f"the cut vocabulary restores {text[:60]!r} as {restored[:60]!r}",
                remedy="report the tokenizer; leave vocabulary out of structure.keep until then",
            )

        # A token is the same if it has the same id and ends at the same byte of the text.
        dense_tokens = set(zip(_find_stops(dense, dense_ids), dense_ids, strict=True))
        renumbered = old_ids[cut_ids].tolist()
        cut_tokens = set(zip(_find_stops(cut, cut_ids), renumbered, strict=True))

        before += len(dense_ids)
        after += len(cut_ids)
        same += len(dense_tokens & cut_tokens)

    return TokenizationComparison(before, after, same)


def _find_stops(encoder: PromptEncoder, ids: list[int]) -> list[int]:
    """Return the byte where each token ends; byte-level tokens have one letter for each byte."""
    tokens = encoder.tokenizer.ids_to_tokens(ids)
    return list(accumulate(map(len, tokens)))
