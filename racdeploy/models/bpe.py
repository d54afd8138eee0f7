"""BPE with fewer tokens: the tokens that a kept token needs, and the choice of tokens.

Bytes are tokens: the characters of byte-level BPE, or those that SentencePiece falls back to where
a character is no token. BPE merges the pair of lowest rank first. No merge crosses the ends of a
token that comes out of a word, so a token is built as BPE builds its text alone. If every
intermediate token is kept, and the merges stay in their order, a word of kept tokens is tokenized
as before: of the pairs that can be merged, the first one is still there, and none is new.
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
from tokenizers.pre_tokenizers import ByteLevel

from racdeploy.errors import UsageError
from racdeploy.models.tokenizer_files import TokenizerFiles, check_ids, read_tokenizer
from racdeploy.models.tokenizer_schema import flatten_sequence, read_merges

BYTE_COUNT = 256
SPACE = "▁"  # of SentencePiece
BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(BYTE_COUNT))
Pair = tuple[str, str]


@dataclass(frozen=True)
class BytePairs:
    """A BPE tokenizer: token texts by id, ids of added tokens, and merges by rank."""

    texts: Mapping[int, str]
    added: frozenset[int]
    merges: tuple[Pair, ...]

    @classmethod
    def read(cls, files: TokenizerFiles) -> BytePairs:
        """Read tokenizer.json; raises UsageError if its vocabulary cannot be cut."""
        if reason := unsupported_reason(files.tokenizer_json):
            raise UsageError(
                "vocabulary-cannot-be-cut",
                f"{files.folder}: the vocabulary cannot be cut: {reason}",
                remedy="leave vocabulary out of structure.keep",
            )

        ids = read_tokenizer(files.file).get_vocab(with_added_tokens=True)
        written = files.tokenizer_json.get("added_tokens") or []
        added = {token["id"]: token["content"] for token in written}
        check_ids(files.file, added.items(), ids)

        texts = {i: text for text, i in ids.items()}
        merges = tuple(read_merges(files.tokenizer_json["model"]))
        return cls(texts, frozenset(added), merges)

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each text."""
        return {text: i for i, text in self.texts.items()}

    @cached_property
    def ranks(self) -> Mapping[Pair, int]:
        """The rank of each merge; the first one counts if a merge is listed twice."""
        return {pair: rank for rank, pair in reversed([*enumerate(self.merges)])}

    @property
    def byte_ids(self) -> frozenset[int]:
        """Tokens of single bytes; a tokenizer may lack bytes that its training text never had."""
        texts = BYTE_PIECES if self.ids.keys() >= BYTE_PIECES else ByteLevel.alphabet()
        return frozenset(self.ids[text] for text in texts if text in self.ids)

    def list_needed(self, token: int) -> set[int]:
        """Return the tokens that BPE merges through to build one, itself included.

        A token that no merges produce, as those that only ``ignore_merges`` finds, needs no other.
        """
        text = self.texts[token]
        if token in self.added:
            return {token}

        parts = list(text)
        made = {token} | {self.ids[part] for part in parts if part in self.ids}
        while len(parts) > 1:
            index = self._find_first(parts)
            if index is None:
                return {token}
            parts[index : index + 2] = ["".join(parts[index : index + 2])]
            made.add(self.ids[parts[index]])

        return made

    def add_needed(self, tokens: Iterable[int]) -> set[int]:
        """Return tokens with all that they need: intermediate tokens, bytes and added tokens."""
        closed = set(self.added | self.byte_ids)
        if SPACE in self.ids:  # as bytes it would come back as itself
            closed.add(self.ids[SPACE])
        for token in tokens:
            if token not in closed:
                closed |= self.list_needed(token)
        return closed

    def fill_by_rank(self, kept: set[int], size: int) -> NDArray[np.int64]:
        """Return ``size`` ids in ascending order: those kept, then others by merge rank.

        Ranks follow the frequency in the text that the tokenizer was trained on.
        """
        assert len(kept) <= size <= len(self.texts), "a size between what is needed and all"
        filled = set(kept)

        ranks: dict[str, int] = {}
        for rank, pair in enumerate(self.merges):
            ranks.setdefault("".join(pair), rank)
        last = len(self.merges)
        by_rank = sorted(self.texts, key=lambda token: (ranks.get(self.texts[token], last), token))

        # A token that does not fit with all that it needs may fit in a later round, when the tokens
        # that it needs have been added on their own rank.
        while len(filled) < size:
            for token in by_rank:
                if len(filled) == size:
                    break
                if token not in filled:
                    needed = self.list_needed(token) - filled
                    if len(filled) + len(needed) <= size:
                        filled |= needed

        return np.array(sorted(filled), np.int64)

    def _find_first(self, parts: list[str]) -> int | None:
        """Return the index of the pair that BPE merges next, or None."""
        known = [
            (self.ranks[pair], index)
            for index, pair in enumerate(pairwise(parts))
            if pair in self.ranks
        ]
        return min(known)[1] if known else None


def unsupported_reason(tokenizer: Mapping[str, Any]) -> str:
    """Return the reason why a tokenizer's vocabulary cannot be cut, or an empty string."""
    model = tokenizer.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        return f"its tokenizer is {str(model['type'])[:40]!r}, and only BPE can be cut"
    if not model.get("vocab") or not model.get("merges"):
        return "its tokenizer has no vocabulary, or no merges"
    if len({*model["vocab"].values()}) < len(model["vocab"]):
        return "two of its tokens have the same id"

    steps = flatten_sequence(tokenizer.get("pre_tokenizer"), "pretokenizers")
    falls_back = bool(model.get("byte_fallback")) and model["vocab"].keys() >= BYTE_PIECES
    if falls_back == any(step.get("type") == "ByteLevel" for step in steps):
        return "its tokens do not stand for bytes, so texts would be lost"

    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            return f"its tokenizer has {option} {model[option]!r}"

    return ""
