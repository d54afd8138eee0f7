"""Read the tokenizer of a checkpoint for a GGUF file: byte-level BPE, or in SentencePiece's form.

Source: llama.cpp ``conversion/base.py`` (get_vocab_base).
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.exporting.gguf.header import open_header
from racdeploy.exporting.gguf.pretokenizers import (
    describe_lost_normalizer,
    find_approximation,
    find_pre_tokenizer,
)
from racdeploy.exporting.gguf.sentencepiece import (
    GEMMA4,
    adds_space_prefix,
    can_be_gemma4,
    read_pieces,
)
from racdeploy.exporting.gguf.tokens import Tokens, read_special_tokens
from racdeploy.exporting.gguf.vocabulary import Vocabulary
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import check_ids, read_tokenizer
from racdeploy.models.tokenizer_schema import flatten_sequence


def read_vocabulary(
    checkpoint: Checkpoint, pre_tokenizer: str | None = None, *, approximate: bool = False
) -> Vocabulary:
    """Read the tokenizer of a checkpoint.

    Args:
        pre_tokenizer: llama.cpp's name for it; by default it is found from tokenizer.json.
        approximate: accept the nearest one if llama.cpp has no equal.
    """
    tokens = Tokens.read(checkpoint)
    file = checkpoint.tokenizer.file
    library = read_tokenizer(file)
    check_ids(file, tokens.texts.items(), library.get_vocab(with_added_tokens=True))

    size = checkpoint.shape.vocab_size
    tokens.check_size(size)
    special = read_special_tokens(checkpoint, tokens)
    if tokens.is_sentencepiece:
        return read_pieces(checkpoint, tokens, special, library.encode)

    types, texts = tokens.list_types(size), tokens.list_texts(size)
    note = describe_lost_normalizer(tokens.normalizers)
    if not pre_tokenizer:
        pre_tokenizer = find_pre_tokenizer(
            tokens.pre_tokenizers,
            ignore_merges=bool(tokens.tokenizer["model"].get("ignore_merges", False)),
            approximate=approximate,
        )

    return Vocabulary(
        model="gpt2",
        texts=texts,
        types=types,
        special=special,
        notes=tuple(filter(None, [note, *special.notes])),
        pre_tokenizer=pre_tokenizer,
        merges=tuple(_join_byte_level(left, right) for left, right in tokens.merges),
    )


def _join_byte_level(left: str, right: str) -> str:
    """Return a merge as a file has it; byte-level BPE maps a space to Ġ."""
    return f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}"


def write_approximate_tokenizer(
    checkpoint: Checkpoint, out: Path, pre_tokenizer: str | None = None
) -> str:
    """Write a file with only the vocabulary, if llama.cpp may tokenize differently.

    Returns:
        llama.cpp's name for the pre-tokenizer; empty, and no file is written, if it is known to be
        equal.
    """
    written = checkpoint.tokenizer.tokenizer_json.get("pre_tokenizer")
    steps = flatten_sequence(written, "pretokenizers")
    if pre_tokenizer is None and find_approximation(steps) is None:
        return ""

    vocabulary = read_vocabulary(checkpoint, pre_tokenizer, approximate=True)
    with open_header(out, "llama") as writer:
        vocabulary.write(writer, "")
    return vocabulary.pre_tokenizer


def adds_bos(checkpoint: Checkpoint) -> bool:
    """Return True if llama.cpp's tokenizer adds the bos token in front of a text."""
    tokens = Tokens.read(checkpoint)
    is_like_gemma4 = checkpoint.family.gguf_arch == GEMMA4 and tokens.is_sentencepiece
    if is_like_gemma4 and can_be_gemma4(tokens, adds_space_prefix(tokens)):
        return True
    return read_special_tokens(checkpoint, tokens).adds["bos"]
