"""Scores of SentencePiece's pieces: stored in ``tokenizer.model``, or from the order of merges.

llama.cpp merges by the highest score, BPE by the earliest merge. They agree if every way to cut a
piece into two pieces is a merge, and all merges of one piece come before or after all of another.
Source: llama.cpp ``src/llama-vocab.cpp`` (llm_tokenizer_spm).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from racdeploy.errors import MissingExtraError, ModelError
from racdeploy.exporting.gguf.tokens import Tokens
from racdeploy.files.reading import Json
from racdeploy.models.bpe import BYTE_PIECES, Pair

ADDED_SCORE, UNUSED_SCORE = -1000.0, -10_000.0


def read_scores(tokens: Tokens, model: Path, *, has_fallback: bool) -> dict[str, float] | None:
    """Return the score of each piece, from ``tokenizer.model`` or the order of the merges.

    Args:
        model: the file ``tokenizer.model``, which may be missing.
        has_fallback: return None, do not raise, if llama.cpp would merge differently.

    Raises:
        ModelError: llama.cpp would merge differently by these scores.
    """
    vocab = tokens.vocab
    _check_characters(vocab, tokens.added_texts)

    made = [left + right for left, right in tokens.merges]
    if model.is_file():
        scores = _read_stored_scores(model, vocab, tokens.added)
    else:
        scores = dict.fromkeys(vocab, 0.0) | score_by_rank(made)

    wrong = _find_wrong_join(vocab, set(tokens.merges), tokens.added_texts)
    if not wrong:
        scored = [(piece, scores[piece]) for piece in made]
        wrong = _find_wrong_order(scored, tokens.added_texts)
    if wrong and not has_fallback:
        raise wrong
    return None if wrong else scores


def list_scores(tokens: Tokens, scores: Mapping[str, float], size: int) -> tuple[float, ...]:
    """Return the score of each row of the embedding."""
    in_order = []
    for i in range(size):
        score = scores.get(tokens.texts.get(i, ""), UNUSED_SCORE)
        in_order.append(ADDED_SCORE if i in tokens.added else score)
    return tuple(in_order)


def check_bytes(vocab: Mapping[str, int]) -> None:
    """Refuse a vocabulary without a token for each byte."""
    if missing := sorted(BYTE_PIECES - vocab.keys()):
        raise ModelError(
            "unsupported-tokenizer",
            f"the tokenizer spells unknown characters in bytes and has no token {missing[0]!r}",
        )


def _check_characters(vocab: Mapping[str, int], added: Set[str]) -> None:
    """Refuse pieces that llama.cpp cannot build from characters of the vocabulary."""
    for piece in vocab.keys() - BYTE_PIECES - added:
        unknown = [character for character in piece if character not in vocab]
        if len(piece) > 1 and unknown:
            raise ModelError(
                "unsupported-tokenizer",
                f"the token {piece!r} holds {unknown[0]!r}, which the tokenizer's vocabulary lacks",
            )


def _find_wrong_join(
    vocab: Mapping[str, int], merges: Set[Pair], added: Set[str]
) -> ModelError | None:
    """Return an error for the first piece that llama.cpp would merge from other parts, or None."""
    for piece in vocab.keys() - BYTE_PIECES - added:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab and (left, right) not in merges:
                return ModelError(
                    "missing-merge",
                    f"llama.cpp would join {left!r} and {right!r} to {piece!r}, and the tokenizer"
                    " has no such merge",
                    remedy="its merges were not made from a SentencePiece model, and with a space"
                    " put first it has no GGUF form yet",
                )

    return None


def score_by_rank(made: Sequence[str]) -> dict[str, float]:
    """Return for each piece the negative rank of the first merge that makes it.

    Pieces with interleaving merges had equal scores, as Mistral's runs of spaces, and keep them.
    """
    last = {piece: rank for rank, piece in enumerate(made)}
    scores = {}
    start, stop = 0, -1  # ranks of the current run of interleaving merges

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


def _find_wrong_order(made: Sequence[tuple[str, float]], added: Set[str]) -> ModelError | None:
    """Return an error if scores rise along the merges; added tokens are found before any merge."""
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
    model: Path, vocab: Mapping[str, int], added: Mapping[int, Json]
) -> dict[str, float]:
    """Return the scores of tokenizer.model, whose pieces have to be those of the vocabulary."""
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
