"""Write a tokenizer.json in SentencePiece's form: pieces with scores instead of merges.

If llama.cpp would merge differently by scores, merges are written as they are, in the form of Gemma
4: llama.cpp then applies them within each line and each run of line ends.
Source: llama.cpp ``src/llama-vocab.cpp`` (llm_tokenizer_spm, GEMMA4) and ``conversion/base.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from racdeploy.errors import ModelError
from racdeploy.exporting.gguf.piece_scores import (
    ADDED_SCORE,
    check_bytes,
    list_scores,
    read_scores,
)
from racdeploy.exporting.gguf.pretokenizers import format_steps
from racdeploy.exporting.gguf.tokens import SpecialTokens, Tokens
from racdeploy.exporting.gguf.vocabulary import Vocabulary
from racdeploy.files.reading import Json
from racdeploy.models.bpe import SPACE
from racdeploy.models.checkpoint import Checkpoint

GEMMA4 = "gemma4"
"""llama.cpp's name for BPE with merges of SentencePiece's pieces, without byte mapping."""
Encode = Callable[[str], list[int]]
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_SPLIT_SPACES = {
    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
}  # fmt: skip
_FORMS: tuple[tuple[list[Json], list[Json], bool], ...] = (
    ([_PREPEND, _REPLACE], [], True),
    ([_REPLACE], [], False),
    ([_REPLACE], [_SPLIT_SPACES], False),  # no space is left to split at
)


def read_pieces(
    checkpoint: Checkpoint, tokens: Tokens, special: SpecialTokens, encode: Encode
) -> Vocabulary:
    """Return the tokenizer of a checkpoint: with scores, or with merges in the form of Gemma 4.

    Args:
        encode: returns the ids of a text, by the tokenizers library.
    """
    add_space_prefix = adds_space_prefix(tokens)
    _check_added_tokens(tokens.added, add_space_prefix)
    is_gemma4 = checkpoint.family.gguf_arch == GEMMA4 and can_be_gemma4(tokens, add_space_prefix)
    size = checkpoint.shape.vocab_size

    check_bytes(tokens.vocab)
    scores = None
    if not is_gemma4:
        model = checkpoint.folder / "tokenizer.model"
        scores = read_scores(tokens, model, has_fallback=not add_space_prefix)
    if scores is not None:
        return Vocabulary(
            model="llama",
            scores=list_scores(tokens, scores, size),
            texts=tokens.list_texts(size, plain_spaces=True),
            types=tokens.list_types(size),
            special=special,
            notes=special.notes,
            add_space_prefix=add_space_prefix,
        )

    check_merges(tokens.vocab, tokens.added_texts, encode)
    merging = Vocabulary(
        model=GEMMA4,
        texts=tokens.list_texts(size),  # with replaced spaces, added tokens too
        types=tokens.list_types(size),
        special=special,
        notes=special.notes,
        pre_tokenizer=GEMMA4,
        merges=tuple(map(" ".join, tokens.merges)),
    )
    return _as_converted(merging) if is_gemma4 else merging


def adds_space_prefix(tokens: Tokens) -> bool:
    """Return True if a text gets a space in front, also after a special token."""
    for normalizers, pre_tokenizers, adds_space in _FORMS:
        if (tokens.normalizers, tokens.pre_tokenizers) == (normalizers, pre_tokenizers):
            return adds_space
    if not tokens.normalizers and _only_replaces_spaces(tokens):
        return False

    steps = [str(step.get("type")) for step in (*tokens.normalizers, *tokens.pre_tokenizers)]
    scheme = ""
    for step in tokens.pre_tokenizers:
        if step.get("type") == "Metaspace":
            scheme = f" with prepend_scheme {str(step.get('prepend_scheme'))!r:.40}"
    raise ModelError(
        "unsupported-tokenizer",
        f"llama.cpp has no counterpart for the tokenizer's"
        f" {format_steps(steps) or 'lack of a normalizer'}{scheme}",
        remedy="SentencePiece tokenizers whose normalizer replaces spaces, with or without one put"
        " in front, work",
    )


def _only_replaces_spaces(tokens: Tokens) -> bool:
    """Return True for a Metaspace that adds no space in front and whose splits change nothing."""
    match tokens.pre_tokenizers:
        case [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", **rest}]:
            crossing = (piece for piece in tokens.vocab if SPACE in piece[1:])
            return not rest.get("split", True) or not any(crossing)
    return False


def can_be_gemma4(tokens: Tokens, add_space_prefix: bool) -> bool:
    """Return True unless a merge joins lines, each of which llama.cpp merges alone."""
    made = (left + right for left, right in tokens.merges)
    joins_lines = any("\n" in piece and piece.strip("\n") for piece in made)
    return not add_space_prefix and not joins_lines


def _check_added_tokens(added: Mapping[int, Json], add_space_prefix: bool) -> None:
    """Refuse added tokens that llama.cpp would search in another text than the tokenizer."""
    for token in added.values():
        content = token["content"]
        if token.get("normalized") and (add_space_prefix or " " in content):
            raise ModelError(
                "unsupported-tokenizer",
                f"the tokenizer searches its added token {content!r} in normalized text, llama.cpp"
                " in the text itself",
                remedy='set "normalized": false for it in tokenizer.json',
            )

        if add_space_prefix and not token.get("special") and SPACE in content:
            raise ModelError(
                "unsupported-tokenizer",
                f"llama.cpp finds the added token {content!r} before it adds the leading space, not"
                " after",
            )


def check_merges(vocab: Mapping[str, int], added: AbstractSet[str], encode: Encode) -> None:
    """Refuse merges that llama.cpp would apply differently in the form of Gemma 4.

    Args:
        added: texts of added tokens, which are found before any merge.
        encode: returns the ids of a text, by the tokenizers library.
    """
    for piece in vocab.keys() - added:
        if " " in piece or ("\n" in piece and {*piece} != {"\n"}):
            raise ModelError(
                "unsupported-tokenizer", f"llama.cpp splits a text within the token {piece!r}"
            )

        # llama.cpp looks up a run of line ends as a whole before it merges.
        if "\n" in piece and encode(piece) != [vocab[piece]]:
            raise ModelError(
                "unsupported-tokenizer",
                f"llama.cpp takes {piece!r} for one token, and the tokenizer's merges never make"
                " it",
            )


def _as_converted(vocabulary: Vocabulary) -> Vocabulary:
    """Return the tokenizer of Gemma 4 with the keys that llama.cpp's converter writes for it.

    Source: llama.cpp ``conversion/gemma.py`` (``Gemma4Model.set_vocab``).
    """
    return replace(
        vocabulary,
        pre_tokenizer="",
        scores=(ADDED_SCORE,) * len(vocabulary.texts),
        add_space_prefix=False,
        special=replace(vocabulary.special, adds={**vocabulary.special.adds, "bos": True}),
    )
