"""A model's tokenizer, computed in a reading process; its names are those of ``tokenizers``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.reading import read_bytes
from racdeploy.sandbox.ids import pack, unpack
from racdeploy.sandbox.reader import MEMORY_BYTES, SECONDS, Reader, Request

MOST_BYTES = 64_000_000
"""Of the file: the tokenizer of 262,144 tokens takes 35 MB."""

# Beyond what every call has. A tokenizer takes 10 bytes for each of its file.
_MEMORY_PER_BYTE = 24
_READING_S_PER_BYTE = 2e-6
ENCODING_S_PER_CHARACTER = 2e-5
_DECODING_S_PER_ID = 2e-5
_LONGEST_TEXT = 16_000_000  # bytes, as the process has it in characters
_DAMAGED = "copy the file again from its source"


class Tokenizer:
    """A ``tokenizer.json``, without the limits of length that some files carry.

    Its process is started by the first question, or by ``reader.start()``; templates of the same
    model can be rendered there, too.
    """

    def __init__(self, file: Path) -> None:
        content = read_bytes(file, MOST_BYTES)
        size = len(content)

        self.reader = Reader("racdeploy.sandbox.texts", MEMORY_BYTES + _MEMORY_PER_BYTE * size)
        request = Request(
            "read_tokenizer",
            {},
            payload=content,
            code="not-a-tokenizer",
            what=f"{file} is not a tokenizer",
            remedy=_DAMAGED,
            seconds=SECONDS + _READING_S_PER_BYTE * size,
        )
        self.reader.keep("tokenizer", request)
        self._what = f"the tokenizer {file} failed"

        # Bytes of the tokens that were decoded so far; None where bytes do not make the text.
        self._bytes: dict[int, bytes] | None = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text as it is: special tokens written in it count, none are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        seconds = ENCODING_S_PER_CHARACTER * sum(map(len, texts))
        header, payload = self._ask("encode", seconds, texts=texts)
        return unpack(header["lengths"], payload)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens written out."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each sequence of ids."""
        known = self._learn_bytes(sequences)
        if known is None:
            return self._decode(sequences)

        texts = []
        for ids in sequences:
            pieces = [known[token] for token in ids]
            size = sum(map(len, pieces))
            if size > _LONGEST_TEXT:
                raise ArtifactError(
                    "tokenizer-failed", f"{self._what}: more than {_LONGEST_TEXT} bytes of text"
                )
            texts.append(b"".join(pieces).decode("utf-8", "replace"))
        return texts

    def _learn_bytes(self, sequences: Sequence[Sequence[int]]) -> dict[int, bytes] | None:
        """Return the bytes of all these tokens, after asking for new ones."""
        known = self._bytes
        if known is None:
            return None

        new = [token for ids in sequences for token in ids if token not in known]
        if not new:
            return known

        new = sorted(set(new))
        _, payload = _pack([new])
        header, found = self._ask("name_bytes", _DECODING_S_PER_ID * len(new), payload)
        if header["lengths"] is None:
            self._bytes = None
            return None

        start = 0
        for token, length in zip(new, header["lengths"], strict=True):
            known[token] = found[start : start + length]
            start += length
        return known

    def _decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        lengths, payload = _pack(sequences)
        seconds = _DECODING_S_PER_ID * sum(lengths)
        header, _ = self._ask("decode", seconds, payload, lengths=lengths)
        return list(header["texts"])

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Return the id of each token's text."""
        header, _ = self._ask("vocabulary", SECONDS, with_added_tokens=with_added_tokens)
        return dict(header["ids"])

    def get_vocab_size(self) -> int:
        """Return how many tokens there are, added ones included."""
        return int(self._describe()["size"])

    def get_added_ids(self) -> list[int]:
        """Return the ids of the tokens that are added to the vocabulary."""
        return list(self._describe()["added"])

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """The texts of control tokens, as those that begin and end a turn; the longest first."""
        texts = sorted(set(filter(None, self._describe()["controls"])))
        return tuple(sorted(texts, key=len, reverse=True))

    def blank_ids(self, characters: Collection[str], texts: Collection[str]) -> list[int]:
        """Return the tokens of such characters alone, and those that are one of the texts."""
        asked = list(characters), list(texts)
        header, _ = self._ask("blank_ids", SECONDS, characters=asked[0], texts=asked[1])
        return list(header["ids"])

    def token_to_id(self, text: str) -> int | None:
        """Return the id of a token, None where there is none."""
        return self.tokens_to_ids([text])[0]

    def tokens_to_ids(self, texts: Sequence[str]) -> list[int | None]:
        """Return the id of each token."""
        return list(self._ask("find_tokens", texts=texts)[0]["ids"])

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ids as the vocabulary writes them."""
        return list(self._ask("name_tokens", ids=ids)[0]["texts"])

    def check(self) -> None:
        """Wait until it is read; an ArtifactError says that it is none."""
        self._describe()

    def _describe(self) -> dict[str, Any]:
        return self._ask("describe")[0]

    def _ask(
        self, op: str, more_seconds: float = 0.0, payload: bytes = b"", **values: Any
    ) -> tuple[dict[str, Any], bytes]:
        seconds = SECONDS + more_seconds
        failing = "tokenizer-failed", self._what, _DAMAGED
        return self.reader.ask(Request(op, values, payload, *failing, seconds))


def _pack(sequences: Sequence[Sequence[int]]) -> tuple[list[int], bytes]:
    try:
        return pack(sequences)
    except (OverflowError, TypeError) as error:
        raise UsageError(
            "token-id-not-number", f"a token id is no number from 0 to 2**32 - 1: {error}"
        ) from error
