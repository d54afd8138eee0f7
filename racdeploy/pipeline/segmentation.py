"""How two tokenizers cut the same texts: that of a model, and the same one with fewer tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import GateError
from racdeploy.runtime.template import PromptEncoder


@dataclass(frozen=True)
class Segmentation:
    """Tokens of some texts in both vocabularies, those that are the same, and words."""

    before: int
    after: int
    same: int
    words: int

    @property
    def same_share(self) -> float:
        """Share of the tokens before that are there after, at the same place."""
        return self.same / max(1, self.before)

    def describe(self, what: str) -> str:
        """Return how much longer some texts got, as a sentence for the report."""
        words = max(1, self.words)
        return (
            f"{what} {self.before / words:.3f} tokens a word in the dense vocabulary and "
            f"{self.after / words:.3f} in the cut one, {self.after / max(1, self.before):.4f} times"
        )


def compare_segmentation(
    dense: PromptEncoder, cut: PromptEncoder, old_ids: NDArray[np.int64], texts: Iterable[str]
) -> Segmentation:
    """Cut texts into tokens in both vocabularies; both must give the same text back.

    Args:
        old_ids: the dense id of each token of the cut vocabulary.

    Raises:
        GateError: the cut tokenizer does not give a text back as the dense one does.
    """
    before = after = same = words = 0

    for text in texts:
        dense_ids, dense_tokens = _tokenize(dense, text)
        cut_ids, cut_tokens = _tokenize(cut, text)

        expected, found = dense.decode(dense_ids), cut.decode(cut_ids)
        if found != expected:
            raise GateError(
                f"the cut vocabulary gives {text[:60]!r} back as {found[:60]!r}",
                remedy="report the tokenizer; leave vocabulary out of structure.keep until then",
            )

        renumbered = {(start, stop, int(old_ids[i])) for start, stop, i in cut_tokens}
        same += len(renumbered & dense_tokens)
        before += len(dense_ids)
        after += len(cut_ids)
        words += len(text.split())

    return Segmentation(before, after, same, words)


def _tokenize(encoder: PromptEncoder, text: str) -> tuple[list[int], set[tuple[int, int, int]]]:
    """Return ids, and the tokens with the byte at which each starts and stops."""
    ids = encoder.encode_text(text)
    sizes = [len(encoder.tokenizer.id_to_token(i)) for i in ids]
    stops = np.cumsum(sizes, dtype=np.int64).tolist()

    return ids, {(stop - size, stop, i) for stop, size, i in zip(stops, sizes, ids, strict=True)}
