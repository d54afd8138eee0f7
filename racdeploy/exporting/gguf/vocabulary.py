"""Read and write the tokenizer of a GGUF file: byte-level BPE, or BPE in SentencePiece's form.

Source: llama.cpp ``conversion/base.py`` (get_vocab_base) and ``gguf-py/gguf/vocab.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import GGUFWriter, TokenType

from racdeploy.errors import ModelError
from racdeploy.exporting.gguf import sentencepiece as pieces
from racdeploy.exporting.gguf.pretokenizers import (
    describe_lost_normalizer,
    find_approximation,
    find_pre_tokenizer,
)
from racdeploy.exporting.gguf.tokens import SpecialTokens, Tokens, read_special_tokens
from racdeploy.models.bpe import BYTE_PIECES, SPACE
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import read_tokenizer
from racdeploy.models.tokenizer_schema import read_merges

GEMMA4 = "gemma4"
"""llama.cpp's name for BPE with merges of SentencePiece's pieces, without byte mapping."""


@dataclass(frozen=True)
class Vocabulary:
    """Values of the keys ``tokenizer.ggml.*``; one text for each row of the embedding.

    ``model`` is ``gpt2``, byte-level BPE: byte-mapped texts and merges, ``left right``, best first;
    ``llama``, SentencePiece: scores, and a space in front or not; or ``gemma4``: merges of
    SentencePiece's texts.
    """

    model: str
    texts: tuple[str, ...]
    types: tuple[TokenType, ...]
    special: SpecialTokens
    notes: tuple[str, ...]
    pre_tokenizer: str = "default"
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    add_space_prefix: bool | None = None

    def write(self, writer: GGUFWriter, chat_template: str) -> None:
        """Write the tokenizer's keys into a header."""
        writer.add_tokenizer_model(self.model)
        if self.pre_tokenizer:
            writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.texts)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.add_space_prefix is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix)

        for kind, i in self.special.ids.items():
            getattr(writer, f"add_{kind}_token_id")(i)

        writer.add_add_bos_token(self.special.adds["bos"])
        writer.add_add_eos_token(self.special.adds["eos"])
        writer.add_chat_template(chat_template)

    def check_model_name(self, name: str) -> None:
        """Refuse a model name for which llama.cpp expects tokens that the vocabulary lacks.

        Source: llama.cpp ``src/llama-vocab.cpp``, attributes set by the model's name.
        """
        match = re.search("phi-?3", name.lower())
        expected = ("</s>", "<unk>", "<s>", "<|endoftext|>")
        missing = [text for text in expected if text not in self.texts]
        if match and missing:
            raise ModelError(
                "misleading-model-name",
                f"the name {name!r} holds {match[0]!r}, so llama.cpp expects a token {missing[0]!r}"
                " and fails without it",
                remedy="rename the model's folder",
            )


def read_vocabulary(
    checkpoint: Checkpoint, pre_tokenizer: str | None = None, *, approximate: bool = False
) -> Vocabulary:
    """Read the tokenizer of a checkpoint.

    Args:
        pre_tokenizer: llama.cpp's name for it; by default it is found from tokenizer.json.
        approximate: accept the nearest one if llama.cpp has no equal.
    """
    tokens = Tokens.read(checkpoint)
    tokens.check_ids(checkpoint)
    special = read_special_tokens(checkpoint, tokens)
    if pieces.is_sentencepiece(tokens.tokenizer):
        return _read_sentencepiece(checkpoint, tokens, special)

    size = checkpoint.shape.vocab_size
    note = describe_lost_normalizer(tokens.tokenizer)
    merges = [  # byte-level BPE maps a space to Ġ
        f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}"
        for left, right in read_merges(tokens.tokenizer["model"])
    ]

    return Vocabulary(
        model="gpt2",
        texts=_fill_gaps(tokens.texts, size),
        types=tuple(map(tokens.type_of, range(size))),
        special=special,
        notes=tuple(filter(None, [note, *_notes(tokens, special)])),
        pre_tokenizer=pre_tokenizer
        or find_pre_tokenizer(tokens.tokenizer, approximate=approximate),
        merges=tuple(merges),
    )


def write_approximate_tokenizer(
    checkpoint: Checkpoint, out: Path, pre_tokenizer: str | None = None
) -> str:
    """Write a file with only the vocabulary, if llama.cpp may tokenize differently.

    Returns:
        llama.cpp's name for the pre-tokenizer; empty, and no file is written, if it is known to be
        equal.
    """
    tokenizer = checkpoint.tokenizer.tokenizer_json
    if pre_tokenizer is None and find_approximation(tokenizer) is None:
        return ""

    vocabulary = read_vocabulary(checkpoint, pre_tokenizer, approximate=True)
    with open_header(out, "llama") as writer:
        vocabulary.write(writer, "")
    return vocabulary.pre_tokenizer


@contextmanager
def open_header(file: Path, arch: str) -> Iterator[GGUFWriter]:
    """Yield a writer for the keys of a GGUF file, and write them at the end."""
    with closing(GGUFWriter(file, arch)) as writer:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


def adds_bos(checkpoint: Checkpoint) -> bool:
    """Return True if llama.cpp's tokenizer adds the bos token in front of a text."""
    tokens = Tokens.read(checkpoint)
    return _is_gemma4(checkpoint, tokens) or read_special_tokens(checkpoint, tokens).adds["bos"]


def _is_gemma4(checkpoint: Checkpoint, tokens: Tokens) -> bool:
    """Return True if a tokenizer is written in the form of Gemma 4, like the model.

    llama.cpp merges each of its lines alone; if merges join several lines, it needs scores.
    """
    tokenizer = tokens.tokenizer
    if checkpoint.family.gguf_arch != GEMMA4 or not pieces.is_sentencepiece(tokenizer):
        return False
    return not pieces.adds_space_prefix(tokenizer) and not pieces.merges_across_lines(tokenizer)


def _read_sentencepiece(
    checkpoint: Checkpoint, tokens: Tokens, special: SpecialTokens
) -> Vocabulary:
    add_space_prefix = pieces.adds_space_prefix(tokens.tokenizer)
    pieces.check_added_tokens(tokens.added, add_space_prefix)
    is_gemma4 = _is_gemma4(checkpoint, tokens)
    scores = None
    if not is_gemma4:
        model = checkpoint.folder / "tokenizer.model"
        scores = pieces.read_scores(
            tokens.tokenizer, tokens.added, model, has_fallback=not add_space_prefix
        )

    size = checkpoint.shape.vocab_size
    types = tuple(_piece_type(tokens, i) for i in range(size))

    # llama.cpp searches user-defined tokens before it replaces spaces.
    texts = dict(tokens.texts)
    for i in texts:
        if types[i] == TokenType.USER_DEFINED:
            texts[i] = texts[i].replace(SPACE, " ")

    vocabulary = Vocabulary(
        model="llama",
        texts=_fill_gaps(texts, size),
        types=types,
        special=special,
        notes=tuple(_notes(tokens, special)),
    )
    if scores is None:
        added = {token["content"] for token in tokens.added.values()}
        encode = read_tokenizer(checkpoint.tokenizer.file).encode
        pieces.check_merges(tokens.tokenizer, added, encode)
        joined = tuple(map(" ".join, read_merges(tokens.tokenizer["model"])))
        merging = replace(
            vocabulary,
            model=GEMMA4,
            texts=_fill_gaps(tokens.texts, size),  # with replaced spaces, added tokens too
            pre_tokenizer=GEMMA4,
            merges=joined,
        )
        return _as_converted(merging) if is_gemma4 else merging

    in_order = []
    for i in range(size):
        score = scores.get(tokens.texts.get(i, ""), pieces.UNUSED_SCORE)
        in_order.append(pieces.ADDED_SCORE if i in tokens.added else score)
    return replace(vocabulary, scores=tuple(in_order), add_space_prefix=add_space_prefix)


def _as_converted(vocabulary: Vocabulary) -> Vocabulary:
    """Return the tokenizer of Gemma 4 with the keys that llama.cpp's converter writes for it.

    Source: llama.cpp ``conversion/gemma.py`` (``Gemma4Model.set_vocab``).
    """
    return replace(
        vocabulary,
        pre_tokenizer="",
        scores=(pieces.ADDED_SCORE,) * len(vocabulary.texts),
        add_space_prefix=False,
        special=replace(vocabulary.special, adds={**vocabulary.special.adds, "bos": True}),
    )


def _piece_type(tokens: Tokens, i: int) -> TokenType:
    kind, text = tokens.type_of(i), tokens.texts.get(i)
    if kind == TokenType.NORMAL and text in BYTE_PIECES:
        return TokenType.BYTE
    if kind == TokenType.NORMAL and text == tokens.tokenizer["model"].get("unk_token"):
        return TokenType.UNKNOWN
    return kind


def _fill_gaps(texts: Mapping[int, str], size: int) -> tuple[str, ...]:
    """Return a text for each row of the embedding; rows without a token get llama.cpp's name."""
    filled = tuple(texts.get(i, f"[PAD{i}]") for i in range(size))
    if len(set(filled)) != size:
        [(repeated, _)] = Counter(filled).most_common(1)
        raise ModelError(
            "unsupported-tokenizer",
            f"tokenizer.json has two ids for the token {repeated!r}, which llama.cpp cannot load",
        )
    return filled


def _notes(tokens: Tokens, special: SpecialTokens) -> Iterator[str]:
    stripping = [
        token["content"]
        for token in tokens.added.values()
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    ]

    if stripping:
        count = len(stripping)
        yield f"llama.cpp strips no white space around {count} added tokens, as {stripping[0]!r}"

    for text in special.ignored_eos:
        yield f"llama.cpp does not stop at token {text!r}, the checkpoint does"
