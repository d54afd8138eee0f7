"""Byte-level BPE with fewer tokens: what a kept token needs, and which tokens to keep.

BPE merges the pair of lowest rank first. No merge crosses the ends of a token that comes out of a
word, so a token is built as BPE builds its text alone. Where every token on that way is kept, and
the merges stay in their order, a word of kept tokens is cut as before: of the pairs that can be
merged, the first one is still there, and none is new.
Source: tokenizers 0.22 ``models/bpe/word.rs`` (merge_all) and ``model.rs`` (ignore_merges).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel  # type: ignore[import-untyped]

from racdeploy.errors import UsageError
from racdeploy.models.tokenizer_files import TokenizerFiles, check_ids, read_tokenizer
from racdeploy.models.tokenizer_form import flatten, read_merges

BYTES = 256
Pair = tuple[str, str]


@dataclass(frozen=True)
class BytePairs:
    """A byte-level BPE tokenizer: texts by id, those that are added to it, and merges by rank."""

    texts: Mapping[int, str]
    added: frozenset[int]
    merges: tuple[Pair, ...]

    @classmethod
    def read(cls, files: TokenizerFiles) -> BytePairs:
        """Read tokenizer.json; a UsageError says why its vocabulary cannot be cut."""
        if reason := refusal(files.parsed):
            raise UsageError(
                "vocabulary-cannot-be-cut",
                f"{files.folder}: the vocabulary cannot be cut: {reason}",
                remedy="leave vocabulary out of structure.keep",
            )

        loaded = read_tokenizer(files.file)
        ids = loaded.get_vocab(with_added_tokens=True)
        written = files.parsed.get("added_tokens") or []
        check_ids(files.file, ((token["id"], token["content"]) for token in written), ids)

        texts = {i: text for text, i in ids.items()}
        added = frozenset(loaded.get_added_ids())

        return cls(texts, added, tuple(read_merges(files.parsed["model"])))

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each text."""
        return {text: i for i, text in self.texts.items()}

    @cached_property
    def ranks(self) -> Mapping[Pair, int]:
        """The rank of each merge; of one that is there twice, the first."""
        ranks: dict[Pair, int] = {}
        for rank, pair in enumerate(self.merges):
            ranks.setdefault(pair, rank)
        return ranks

    @property
    def byte_ids(self) -> frozenset[int]:
        """Tokens of single bytes; some tokenizers lack those that no text of theirs had."""
        return frozenset(self.ids[text] for text in ByteLevel.alphabet() if text in self.ids)

    def build(self, token: int) -> set[int]:
        """Return every token that BPE makes on its way to one, itself included.

        A token that no merges give, as those that only ``ignore_merges`` finds, stands alone.
        """
        text = self.texts[token]
        if token in self.added:
            return {token}

        made = {token}
        parts = list(text)
        while len(parts) > 1:
            place = self._find_first(parts)
            if place is None:
                return {token}
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
            made.add(self.ids[parts[place]])

        return made

    def close(self, tokens: Iterable[int]) -> set[int]:
        """Return some tokens with all that are needed: those they are built of, bytes, added."""
        closed = set(self.added | self.byte_ids)
        for token in tokens:
            if token not in closed:
                closed |= self.build(token)
        return closed

    def fill(self, kept: set[int], size: int) -> NDArray[np.int64]:
        """Return ``size`` ids, rising: those kept, then others by the rank of their merge.

        Ranks follow the frequency in the text that the tokenizer was trained on.
        """
        assert len(kept) <= size <= len(self.texts), "a size between what is needed and all"
        filled = set(kept)

        # One that does not fit with all it is built of may fit once these came by themselves.
        while len(filled) < size:
            for token in self._by_rank():
                if len(filled) == size:
                    break
                if token not in filled:
                    needed = self.build(token) - filled
                    if len(filled) + len(needed) <= size:
                        filled |= needed

        return np.array(sorted(filled), np.int64)

    def _by_rank(self) -> list[int]:
        """Return the ids of all tokens, those of the first merges first, the unmerged last."""
        ranks: dict[int, int] = {}
        for rank, (left, right) in enumerate(self.merges):
            if (token := self.ids.get(left + right)) is not None:
                ranks.setdefault(token, rank)

        return sorted(self.texts, key=lambda token: (ranks.get(token, len(self.merges)), token))

    def _find_first(self, parts: list[str]) -> int | None:
        """Return the place of the pair that BPE merges next, or None."""
        best = len(self.merges)
        found = None
        for place, pair in enumerate(pairwise(parts)):
            rank = self.ranks.get(pair, best)
            if rank < best:
                best = rank
                found = place
        return found


def refusal(tokenizer: Mapping[str, Any]) -> str:
    """Return why the vocabulary of a parsed tokenizer.json cannot be cut, or an empty string."""
    model = tokenizer.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        return f"its tokenizer is {model['type'][:40]!r}, and only byte-level BPE can be cut"
    if not model.get("vocab") or not model.get("merges"):
        return "its tokenizer has no vocabulary, or no merges"

    # SentencePiece's form of BPE falls back to bytes, or has no bytes at all.
    steps = flatten(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if model.get("byte_fallback") or all(step.get("type") != "ByteLevel" for step in steps):
        return "its tokenizer is BPE in SentencePiece's form, and only byte-level BPE can be cut"

    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            return f"its tokenizer has {option} {model[option]!r}"

    return ""
