"""Read a tokenizer.json in SentencePiece's form: pieces with scores in place of merges.

llama.cpp joins by the highest score, BPE by the earliest merge. They agree if every cut of a piece
into pieces is a merge, and all merges of one piece come before or after all of another. Where they
do not, merges are written as they are, in the form of Gemma 4: llama.cpp then joins by merges, in
lines and runs of line ends, each alone.
Source: llama.cpp ``src/llama-vocab.cpp`` (llm_tokenizer_spm, GEMMA4) and ``conversion/base.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from racdeploy.errors import MissingExtraError, ModelError
from racdeploy.export.gguf.pretokenizers import show
from racdeploy.models.tokenizer_form import flatten, read_merges

Encode = Callable[[str], list[int]]
SPACE = "▁"
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10_000.0
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_SPLIT_SPACES = {
    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
}  # fmt: skip
_FORMS: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]], bool], ...] = (
    ([_PREPEND, _REPLACE], [], True),
    ([_REPLACE], [], False),
    ([_REPLACE], [_SPLIT_SPACES], False),  # no space is left to split at
)


def is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer.json spells unknown characters in bytes, as SentencePiece does."""
    model = tokenizer.get("model") or {}
    return model.get("type", "BPE") == "BPE" and bool(model.get("byte_fallback"))


def puts_space_first(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether a text gets a space in front, also after a special token."""
    normalizer = flatten(tokenizer.get("normalizer"), "normalizers")
    pre_tokenizer = flatten(tokenizer.get("pre_tokenizer"), "pretokenizers")

    for normalizers, pre_tokenizers, first in _FORMS:
        if (normalizer, pre_tokenizer) == (normalizers, pre_tokenizers):
            return first
    if not normalizer and _only_replaces_spaces(pre_tokenizer, tokenizer):
        return False

    steps = [str(step.get("type")) for step in (*normalizer, *pre_tokenizer)]
    spaced = [step for step in pre_tokenizer if step.get("type") == "Metaspace"]
    how = ""
    if spaced:
        how = f" with prepend_scheme {str(spaced[0].get('prepend_scheme'))!r:.40}"
    raise ModelError(
        "unsupported-tokenizer",
        f"llama.cpp has no counterpart for the tokenizer's"
        f" {show(steps) or 'lack of a normalizer'}{how}",
        remedy="SentencePiece tokenizers whose normalizer replaces spaces, with or without one put"
        " in front, work",
    )


def _only_replaces_spaces(
    pre_tokenizer: list[dict[str, Any]], tokenizer: Mapping[str, Any]
) -> bool:
    """Return whether a Metaspace puts no space first, and its splits change nothing."""
    match pre_tokenizer:
        case [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", **rest}]:
            crossing = (piece for piece in tokenizer["model"]["vocab"] if SPACE in piece[1:])
            return not rest.get("split", True) or not any(crossing)
    return False


def joins_lines(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether a merge joins the end of a line to something else."""
    made = map("".join, read_merges(tokenizer["model"]))
    return any("\n" in piece and piece.strip("\n") for piece in made)


def check_merges(tokenizer: Mapping[str, Any], added: AbstractSet[str], encode: Encode) -> None:
    """Refuse what llama.cpp would join differently by merges in the form of Gemma 4.

    Args:
        added: texts of added tokens, which are found before anything is joined.
        encode: ids of a text, by the tokenizers library.
    """
    vocab = tokenizer["model"]["vocab"]
    _check_bytes(vocab)

    for piece in vocab.keys() - added:
        if " " in piece or ("\n" in piece and {*piece} != {"\n"}):
            raise ModelError(
                "unsupported-tokenizer", f"llama.cpp splits a text within the token {piece!r}"
            )

        # llama.cpp looks a run of line ends up as a whole before it joins.
        if "\n" in piece and encode(piece) != [vocab[piece]]:
            raise ModelError(
                "unsupported-tokenizer",
                f"llama.cpp takes {piece!r} for one token, and the tokenizer's merges never make"
                " it",
            )


def check_added(added: Mapping[int, Mapping[str, Any]], space_first: bool) -> None:
    """Refuse added tokens that llama.cpp would look for in another text."""
    for token in added.values():
        content = token["content"]
        if token.get("normalized") and (space_first or " " in content):
            raise ModelError(
                "unsupported-tokenizer",
                f"the tokenizer looks for its added token {content!r} in normalized text, llama.cpp"
                " in the text itself",
                remedy='set "normalized": false for it in tokenizer.json',
            )

    for token in added.values():
        content = token["content"]
        if space_first and not token.get("special") and SPACE in content:
            raise ModelError(
                "unsupported-tokenizer",
                f"llama.cpp finds the added token {content!r} before it puts a space first, not"
                " after",
            )


def read_scores(
    tokenizer: Mapping[str, Any],
    added: Mapping[int, Mapping[str, Any]],
    model: Path,
    *,
    has_other_form: bool,
) -> dict[str, float] | None:
    """Return the scores, of ``tokenizer.model`` or the merges' order; refuse if joins differ.

    With another form at hand, None is returned where joins differ.
    """
    vocab = tokenizer["model"]["vocab"]
    merges = list(read_merges(tokenizer["model"]))
    _check_bytes(vocab)

    texts = {token["content"] for token in added.values()}
    _check_characters(vocab, texts)

    made = [left + right for left, right in merges]
    if model.is_file():
        scores = _read_stored_scores(model, vocab, added)
    else:
        scores = dict.fromkeys(vocab, 0.0) | score_by_rank(made)

    wrong = _find_wrong_join(vocab, set(merges), texts)
    wrong = wrong or _find_wrong_order([(piece, scores[piece]) for piece in made], texts)
    if wrong and has_other_form:
        return None
    if wrong:
        raise wrong
    return scores


def _check_bytes(vocab: Mapping[str, int]) -> None:
    if missing := sorted(BYTES - vocab.keys()):
        raise ModelError(
            "unsupported-tokenizer",
            f"the tokenizer spells unknown characters in bytes and has no token {missing[0]!r}",
        )


def _find_wrong_join(
    vocab: Mapping[str, int], merges: set[tuple[str, str]], added: set[str]
) -> ModelError | None:
    """Return what is wrong with the first piece that llama.cpp would join from other parts."""
    for piece in vocab.keys() - BYTES - added:
        for place in range(1, len(piece)):
            left, right = piece[:place], piece[place:]
            if left in vocab and right in vocab and (left, right) not in merges:
                return ModelError(
                    "missing-merge",
                    f"llama.cpp would join {left!r} and {right!r} to {piece!r}, and the tokenizer"
                    " has no such merge",
                    remedy="its merges were not made from a SentencePiece model, and with a space"
                    " put first it has no GGUF form yet",
                )

    return None


def _check_characters(vocab: Mapping[str, int], added: set[str]) -> None:
    """Refuse pieces that llama.cpp could not make."""
    for piece in vocab.keys() - BYTES - added:
        strange = [character for character in piece if character not in vocab]
        if len(piece) > 1 and strange:
            raise ModelError(
                "unsupported-tokenizer",
                f"the token {piece!r} holds {strange[0]!r}, which the tokenizer's vocabulary lacks",
            )


def score_by_rank(made: Sequence[str]) -> dict[str, float]:
    """Return minus the rank of the first merge that makes a piece.

    Pieces whose merges interleave had one score, as Mistral's runs of spaces, and get one again.
    """
    last = {piece: rank for rank, piece in enumerate(made)}
    scores: dict[str, float] = {}
    start, stop = 0, -1  # ranks of the interleaving merges at hand

    for rank, piece in enumerate(made):
        if piece in scores:
            continue

        repeats_one_character = len({*piece, *made[start]}) == 1
        if rank > stop or not repeats_one_character:
            start, stop = rank, last[piece]
        else:
            stop = max(stop, last[piece])

        scores[piece] = -float(start)

    return scores


def _find_wrong_order(made: Sequence[tuple[str, float]], added: set[str]) -> ModelError | None:
    """Return where scores rise along the merges; added tokens are found before any join."""
    joined = [(piece, score) for piece, score in made if piece not in added]
    for (early, score), (late, next_score) in itertools.pairwise(joined):
        if next_score > score:
            return ModelError(
                "merges-against-scores",
                f"the tokenizer merges to {early!r} before {late!r}, and its scores say the"
                " reverse",
                remedy="tokenizer.model and tokenizer.json belong to different models, or the"
                " merges were edited",
            )

    return None


def _read_stored_scores(
    model: Path, vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]]
) -> dict[str, float]:
    """Return the scores of tokenizer.model, after comparing its pieces with the vocabulary."""
    try:
        from sentencepiece import SentencePieceProcessor  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise MissingExtraError("sentencepiece", "gguf") from error

    try:
        processor = SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise ModelError(
            "damaged-sentencepiece",
            f"{model} cannot be loaded: {error}",
            remedy="copy it again; or remove it",
        ) from error

    scores = dict.fromkeys(vocab, ADDED_SCORE)

    for piece, i in vocab.items():
        if i >= processor.get_piece_size() or i in added:
            continue

        stored = processor.id_to_piece(i)
        if stored != piece:
            raise ModelError(
                "tokenizers-differ",
                f"{model} has the piece {stored!r} where tokenizer.json has {piece!r}",
                remedy="the files belong to different models",
            )

        scores[piece] = float(processor.get_score(i))

    return scores
