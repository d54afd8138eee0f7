"""Operations of a reading process on a model's texts: its tokenizer, and its chat templates.

Ids are u32 in the payload, one sequence behind the other; ``lengths`` says where each ends.
"""

from __future__ import annotations

import json

from jinja2 import Template
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from racdeploy.processes.messages import Header, Message
from racdeploy.sandbox import chat_template
from racdeploy.sandbox.ids import pack, unpack, unpack_all
from racdeploy.sandbox.limits import limit_processor

MOST_IDS = 4_000_000  # of one call; no model has such a context


class _Texts:
    """What this process was given, and what it answers."""

    def __init__(self) -> None:
        self._tokenizer: Tokenizer
        self._templates: dict[str, Template] = {}

    def read_tokenizer(self, header: Header, payload: bytes) -> Message:
        """Read a tokenizer.json, without the limits of length that some files carry."""
        self._tokenizer = Tokenizer.from_buffer(payload)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        return {}, b""

    def compile_template(self, header: Header, payload: bytes) -> Message:
        self._templates[header["template"]] = chat_template.compile_template(header["source"])
        return {}, b""

    def render(self, header: Header, payload: bytes) -> Message:
        return {"text": self._render(header)}, b""

    def encode_rendered(self, header: Header, payload: bytes) -> Message:
        """Render, put ``lead`` in front where it is not there, and encode what marks divide."""
        text = self._render(header)
        if not text.startswith(header["lead"]):
            text = header["lead"] + text

        # What is rendered is no longer than what it is rendered from, or is encoded quickly.
        expected = min(len(text), header["expected_characters"])
        limit_processor(header["base_s"] + header["encoding_s"] * expected)
        mark = header["mark"]
        return self._encode(text.split(mark) if mark else [text])

    def encode(self, header: Header, payload: bytes) -> Message:
        return self._encode(header["texts"])

    def _render(self, header: Header) -> str:
        template = self._templates[header["template"]]
        text = chat_template.render(template, json.loads(header["variables"]))
        text.encode()  # a lone surrogate is no text
        return text

    def _encode(self, texts: list[str]) -> Message:
        sequences = []
        count = 0

        for text in texts:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            sequences.append(ids)
            count += len(ids)
            _check_size(count, MOST_IDS, "tokens")

        lengths, packed = pack(sequences)
        return {"lengths": lengths}, packed

    def decode(self, header: Header, payload: bytes) -> Message:
        texts = []
        length = 0

        for ids in unpack(header["lengths"], payload):
            text = self._tokenizer.decode(ids, skip_special_tokens=False)
            texts.append(text)
            length += len(text)
            _check_size(length, chat_template.LARGEST_TEXT, "characters")

        return {"texts": texts}, b""

    def name_bytes(self, header: Header, payload: bytes) -> Message:
        """Return the bytes of ids where a text is the bytes of its tokens in a row, else none."""
        if not _joins_bytes(self._tokenizer):
            return {"lengths": None}, b""

        ids = unpack_all(payload)
        found = [_to_bytes(self._tokenizer.id_to_token(token) or "") for token in ids]
        return {"lengths": list(map(len, found))}, b"".join(found)

    def vocabulary(self, header: Header, payload: bytes) -> Message:
        added = header["with_added_tokens"]
        return {"ids": self._tokenizer.get_vocab(with_added_tokens=added)}, b""

    def blank_ids(self, header: Header, payload: bytes) -> Message:
        """Return the tokens that consist of certain characters, or are one of some texts."""
        characters = set(header["characters"])
        texts = set(header["texts"])
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)

        found = []
        for text, token in vocabulary.items():
            if text and (characters.issuperset(text) or text in texts):
                found.append(token)
        return {"ids": found}, b""

    def find_tokens(self, header: Header, payload: bytes) -> Message:
        """Return the ids of tokens, None where there is no such token."""
        return {"ids": [self._tokenizer.token_to_id(text) for text in header["texts"]]}, b""

    def describe(self, header: Header, payload: bytes) -> Message:
        """Return how many tokens there are, the ids of those that are added, and control tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        controls = [token.content for token in added.values() if token.special]
        size = self._tokenizer.get_vocab_size()
        return {"size": size, "added": list(added), "controls": controls}, b""

    def name_tokens(self, header: Header, payload: bytes) -> Message:
        """Return the tokens of ids as the vocabulary writes them, None where there is none."""
        return {"texts": [self._tokenizer.id_to_token(i) for i in header["ids"]]}, b""


def _joins_bytes(tokenizer: Tokenizer) -> bool:
    """Return whether its decoder is ByteLevel's."""
    decoder = tokenizer.decoder
    return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"


def _name_bytes() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for.

    Source: tokenizers 0.22 ``pre_tokenizers/byte_level.rs`` (bytes_char), after GPT-2.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    named = {chr(byte): byte for byte in plain}
    return named | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _name_bytes()


def _to_bytes(token: str) -> bytes:
    """Return a token as ByteLevel's decoder does: one with any other character is its text."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()


def _check_size(size: int, most: int, unit: str) -> None:
    if size > most:
        raise ValueError(f"more than {most} {unit}")


_texts = _Texts()
OPERATIONS = {name: getattr(_texts, name) for name in vars(_Texts) if not name.startswith("_")}
