"""A model's tokenizer, run in a sandbox; methods are named as in ``tokenizers``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.reading import read_bytes
from racdeploy.processes.messages import Header
from racdeploy.sandbox.client import DEFAULT_MEMORY_BYTES, DEFAULT_SECONDS, Sandbox, SandboxRequest
from racdeploy.sandbox.ids import pack_ids, unpack_ids

MAX_BYTES = 64_000_000
"""Maximum size of the file: a tokenizer of 262,144 tokens has 35 MB."""

# In addition to the limits of every call. A tokenizer takes 10 bytes of memory for each byte of its
# file.
_MEMORY_PER_BYTE = 24
_READING_S_PER_BYTE = 2e-6
ENCODING_S_PER_CHARACTER = 2e-5
_DECODING_S_PER_ID = 2e-5
_MAX_TEXT_BYTES = 16_000_000  # the sandbox has the same limit in characters
_DAMAGED = "copy the file again from its source"


@dataclass(frozen=True)
class VocabularyFacts:
    """Facts of a vocabulary.

    Args:
        size: number of tokens, added ones included.
        longest: length of the longest token.
        controls: texts of the control tokens.
        leading_ids: ids before every text of the model, as it was trained.
    """

    size: int
    longest: int
    controls: Sequence[str]
    leading_ids: Sequence[int] = ()


class Tokenizer:
    """A ``tokenizer.json``, without the truncation and padding that some files set.

    The first request starts its sandbox, which can also render templates of the same model.
    """

    def __init__(self, file: Path) -> None:
        content = read_bytes(file, MAX_BYTES)
        size = len(content)

        self.sandbox = Sandbox(
            "racdeploy.sandbox.text_operations", DEFAULT_MEMORY_BYTES + _MEMORY_PER_BYTE * size
        )
        request = SandboxRequest(
            "read_tokenizer",
            {"payload": content},
            code="not-a-tokenizer",
            failure=f"{file} is not a tokenizer",
            remedy=_DAMAGED,
            seconds=DEFAULT_SECONDS + _READING_S_PER_BYTE * size,
        )
        self.sandbox.add_setup("tokenizer", request)
        self._failure = f"the tokenizer {file} failed"

        # Bytes of the tokens that were decoded so far; None where a text is not their joined bytes.
        self._bytes: dict[int, bytes] | None = {}

    def is_alive(self) -> bool:
        """Return whether texts can be encoded; a sandbox that ended starts again by itself."""
        return True

    def close(self) -> None:
        """End its process."""
        self.sandbox.close()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens in it are parsed, none are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        seconds = ENCODING_S_PER_CHARACTER * sum(map(len, texts))
        return unpack_ids(self._ask("encode", seconds, texts=texts))

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
            chunks = [known[token] for token in ids]
            size = sum(map(len, chunks))
            if size > _MAX_TEXT_BYTES:
                raise ArtifactError(
                    "tokenizer-failed",
                    f"{self._failure}: more than {_MAX_TEXT_BYTES} bytes of text",
                )
            texts.append(b"".join(chunks).decode("utf-8", "replace"))
        return texts

    def _learn_bytes(self, sequences: Sequence[Sequence[int]]) -> dict[int, bytes] | None:
        """Return the bytes of all tokens of the sequences; ask the sandbox for unknown ones.

        Return None where a text is not the joined bytes of its tokens.
        """
        known = self._bytes
        if known is None:
            return None

        new = [token for ids in sequences for token in ids if token not in known]
        if not new:
            return known

        new = sorted(set(new))
        answer = self._ask("name_bytes", _DECODING_S_PER_ID * len(new), **_pack([new]))
        if answer["lengths"] is None:
            self._bytes = None
            return None

        start = 0
        for token, length in zip(new, answer["lengths"], strict=True):
            known[token] = answer["payload"][start : start + length]
            start += length
        return known

    def _decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        packed = _pack(sequences)
        seconds = _DECODING_S_PER_ID * sum(packed["lengths"])
        return list(self._ask("decode", seconds, **packed)["texts"])

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Return the ids of all tokens by their texts."""
        answer = self._ask("vocabulary", DEFAULT_SECONDS, with_added_tokens=with_added_tokens)
        return dict(answer["ids"])

    def get_vocab_size(self) -> int:
        """Return the number of tokens, added ones included."""
        return self._facts.size

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """Ids that begin every text of the model, by the tokenizer's own post-processor."""
        return tuple(self._facts.leading_ids)

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts of control tokens, such as those that begin and end a turn; longest first."""
        texts = sorted(set(filter(None, self._facts.controls)))
        return tuple(sorted(texts, key=len, reverse=True))

    def count_at_least(self, text: str) -> int:
        """Return a number of tokens that a text surely has, without encoding it."""
        controls = sum(map(text.count, self.control_tokens))
        return max(controls, len(text) // max(1, self._facts.longest))

    def blank_ids(self, characters: Collection[str], texts: Collection[str]) -> list[int]:
        """Return the ids of tokens of these characters only, or that are one of the texts."""
        known = {"characters": [*characters], "texts": [*texts]}
        return list(self._ask("blank_ids", DEFAULT_SECONDS, **known)["ids"])

    def tokens_to_ids(self, texts: Sequence[str]) -> list[int | None]:
        """Return the id of each token, None for an unknown one."""
        return list(self._ask("find_tokens", texts=texts)["ids"])

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the token of each id as the vocabulary writes it."""
        return list(self._ask("name_tokens", ids=ids)["texts"])

    def check(self) -> None:
        """Wait until the file is loaded; ArtifactError where it is no tokenizer."""
        self.tokens_to_ids([])

    @cached_property
    def _facts(self) -> VocabularyFacts:
        answer = self._ask("describe")
        return VocabularyFacts(
            answer["size"], answer["longest"], answer["controls"], answer["leading_ids"]
        )

    def _ask(self, op: str, more_seconds: float = 0.0, **values: Any) -> Header:
        request = SandboxRequest(
            op,
            values,
            code="tokenizer-failed",
            failure=self._failure,
            remedy=f"shorten the text, or {_DAMAGED}",
            seconds=DEFAULT_SECONDS + more_seconds,
        )
        return self.sandbox.ask(request)


def _pack(sequences: Sequence[Sequence[int]]) -> Header:
    try:
        return pack_ids(sequences)
    except (OverflowError, TypeError) as error:
        raise UsageError(
            "token-id-not-number", f"a token id is not an integer from 0 to 2**32 - 1: {error}"
        ) from error
