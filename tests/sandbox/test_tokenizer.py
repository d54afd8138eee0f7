"""Texts that are put together from bytes of tokens here are those of the tokenizer itself."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import tokenizers

from racdeploy.sandbox import tokenizer as reading
from racdeploy.sandbox.tokenizer import Tokenizer
from tests.support.errors import raises
from tests.support.tiny_models import edit_json, write_tokenizer

DECODERS = {
    "byte-level": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
    "in a sequence": {
        "type": "Sequence",
        "decoders": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}],
    },
    "fused": {"type": "Fuse"},
    "none": None,
}


@pytest.mark.parametrize("decoder", DECODERS)
def test_decodes_as_the_library_does(tmp_path: Path, decoder: str) -> None:
    """Any ids in any order: halves of characters, added tokens, ids of no token."""
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    edit_json(file, decoder=DECODERS[decoder])
    edit_json(file, added_tokens=[{**_ADDED, "id": 600, "content": "<a b>é\u0120"}])
    oracle, found = tokenizers.Tokenizer.from_file(str(file)), Tokenizer(file)

    random = Random(0)
    size = oracle.get_vocab_size() + 50
    sequences = [random.choices(range(size), k=random.randrange(40)) for _ in range(300)]
    sequences += [[token] for token in range(size)]
    expected = [oracle.decode(ids, skip_special_tokens=False) for ids in sequences]
    assert expected == found.decode_batch(sequences)
    assert any("\ufffd" in text for text in expected) == (decoder.startswith(("byte", "in")))
    assert (found._bytes is not None) == (decoder == "byte-level")


def test_what_begins_a_text_is_what_the_library_adds(tmp_path: Path) -> None:
    """A post-processor may add it; a token that the vocabulary merely has is not added."""
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    assert Tokenizer(file).leading_ids == ()

    start = tokenizers.Tokenizer.from_file(str(file)).token_to_id("<|endoftext|>")
    adding = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [start], "tokens": ["<|endoftext|>"]}
        },
    }
    edit_json(file, post_processor=adding)
    assert Tokenizer(file).leading_ids == (start,)


_ADDED = {
    "special": True,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
}


def test_known_tokens_are_not_asked_for_again(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    found = Tokenizer(tmp_path / "tokenizer.json")
    text = found.decode(range(20))
    found.sandbox.close()
    assert text == found.decode(range(20))
    assert found.sandbox.pid is None


def test_texts_beyond_bounds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path)
    found = Tokenizer(tmp_path / "tokenizer.json")
    with raises("token-id-not-number"):
        found.decode([-1])
    monkeypatch.setattr(reading, "_MAX_TEXT_BYTES", 100)
    with raises("tokenizer-failed", "100 bytes"):
        found.decode(list(range(20)) * 20)
