"""Operations of a sandbox on texts: a model's tokenizer and its chat templates.

``payload`` holds the ids of all sequences as u32; ``lengths`` holds the length of each.
"""

from __future__ import annotations

import json

from jinja2 import Template
from tokenizers import Tokenizer

from racdeploy.processes.messages import Header
from racdeploy.sandbox import chat_template
from racdeploy.sandbox.ids import all_ids_from_bytes, pack_ids, unpack_ids
from racdeploy.sandbox.limits import limit_cpu_time

MAX_IDS = 4_000_000  # of one call; more than any model's context


class _Texts:
    """Tokenizer and templates of this process, with the operations on them."""

    def __init__(self) -> None:
        self._tokenizer: Tokenizer
        self._templates: dict[str, Template] = {}

    def read_tokenizer(self, request: Header) -> Header:
        """Load a tokenizer.json, without the truncation and padding that some files set."""
        self._tokenizer = Tokenizer.from_buffer(request["payload"])
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        return {}

    def compile_template(self, request: Header) -> Header:
        self._templates[request["template"]] = chat_template.compile_template(request["source"])
        return {}

    def render(self, request: Header) -> Header:
        return {"text": self._render(request)}

    def encode_rendered(self, request: Header) -> Header:
        """Render, prepend ``lead`` unless it is there, and encode the parts between ``mark``."""
        text = self._render(request)
        if not text.startswith(request["lead"]):
            text = request["lead"] + text

        # What is rendered is no longer than what it is rendered from, or is encoded quickly.
        expected = min(len(text), request["expected_characters"])
        limit_cpu_time(request["base_s"] + request["encoding_s"] * expected)
        mark = request["mark"]
        return self._encode(text.split(mark) if mark else [text])

    def encode(self, request: Header) -> Header:
        return self._encode(request["texts"])

    def _render(self, request: Header) -> str:
        template = self._templates[request["template"]]
        text = chat_template.render(template, json.loads(request["variables"]))
        text.encode()  # a lone surrogate is no text
        return text

    def _encode(self, texts: list[str]) -> Header:
        sequences = []
        count = 0

        for text in texts:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            sequences.append(ids)
            count += len(ids)
            _check_size(count, MAX_IDS, "tokens")

        return pack_ids(sequences)

    def decode(self, request: Header) -> Header:
        texts = []
        length = 0

        for ids in unpack_ids(request):
            text = self._tokenizer.decode(ids, skip_special_tokens=False)
            texts.append(text)
            length += len(text)
            _check_size(length, chat_template.MAX_TEXT_CHARACTERS, "characters")

        return {"texts": texts}

    def name_bytes(self, request: Header) -> Header:
        """Return the bytes of ids, or None where a text is not the joined bytes of its tokens."""
        decoder = self._tokenizer.decoder
        if not (decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"):
            return {"lengths": None}

        ids = all_ids_from_bytes(request["payload"])
        tokens = [_to_bytes(self._tokenizer.id_to_token(token) or "") for token in ids]
        return {"lengths": list(map(len, tokens)), "payload": b"".join(tokens)}

    def vocabulary(self, request: Header) -> Header:
        added = request["with_added_tokens"]
        return {"ids": self._tokenizer.get_vocab(with_added_tokens=added)}

    def blank_ids(self, request: Header) -> Header:
        """Return the ids of tokens that consist of ``characters``, or are one of ``texts``."""
        characters = set(request["characters"])
        texts = set(request["texts"])
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)

        ids = [
            token
            for text, token in vocabulary.items()
            if text and (characters.issuperset(text) or text in texts)
        ]
        return {"ids": ids}

    def find_tokens(self, request: Header) -> Header:
        """Return the id of each token, None for an unknown one."""
        return {"ids": [self._tokenizer.token_to_id(text) for text in request["texts"]]}

    def describe(self, request: Header) -> Header:
        """Return size, longest token and control tokens of the vocabulary, and what leads texts."""
        added = self._tokenizer.get_added_tokens_decoder()
        controls = [token.content for token in added.values() if token.special]
        longest = max(map(len, self._tokenizer.get_vocab()), default=1)
        return {
            "size": self._tokenizer.get_vocab_size(),
            "longest": longest,
            "controls": controls,
            "leading_ids": self._find_leading_ids(),
        }

    def _find_leading_ids(self) -> list[int]:
        """Return the ids that the post-processor puts before a text."""
        whole = self._tokenizer.encode("a").ids
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        for start in range(len(whole)):
            if bare and whole[start : start + len(bare)] == bare:
                return list(whole[:start])
        return []

    def name_tokens(self, request: Header) -> Header:
        """Return the token of each id as the vocabulary writes it, None for an unknown id."""
        return {"texts": [self._tokenizer.id_to_token(i) for i in request["ids"]]}


def _name_bytes() -> dict[str, int]:
    """Return the byte of each character in byte-level tokens.

    Source: tokenizers 0.22 ``pre_tokenizers/byte_level.rs`` (bytes_char), after GPT-2.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    printable = {chr(byte): byte for byte in plain}
    return printable | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _name_bytes()


def _to_bytes(token: str) -> bytes:
    """Return a token's bytes by ByteLevel's rule: with any other character, those of its text."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()


def _check_size(size: int, limit: int, unit: str) -> None:
    if size > limit:
        raise ValueError(f"more than {limit} {unit}")


_texts = _Texts()
OPERATIONS = {name: getattr(_texts, name) for name in vars(_Texts) if not name.startswith("_")}
