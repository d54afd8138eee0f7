"""Tiny SentencePiece tokenizers: trained by the sentencepiece package, written as transformers'
converters do.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cache
from typing import Any

import sentencepiece
from transformers.convert_slow_tokenizer import generate_merges

_SPECIAL = ("<unk>", "<s>", "</s>")


@cache
def train_pieces(texts: Iterable[str], size: int, own: tuple[str, ...]) -> bytes:
    """Return a ``tokenizer.model``: BPE with byte fallback, spaces kept, and tokens of the user's
    own.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=list(own),
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def pieces_json(model: bytes, own: tuple[str, ...], *, space_first: bool) -> dict[str, Any]:
    """Return ``tokenizer.json`` of a SentencePiece model, as Mistral 7B's or as Gemma's.

    Source: transformers ``convert_slow_tokenizer.py``, LlamaConverter and GemmaConverter.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    scores = {
        piece: pieces.get_score(i)
        for piece, i in vocab.items()
        if i >= len(_SPECIAL) and not pieces.is_byte(i)
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    split = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
    ]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_first else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(vocab[text], text, special=text in _SPECIAL) for text in (*_SPECIAL, *own)
        ],
        "normalizer": normalizer if space_first else replace,
        "pre_tokenizer": None if space_first else split,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in generate_merges(vocab, scores.items())],
        },
    }


def _added(i: int, text: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, "special": special, **flags}
