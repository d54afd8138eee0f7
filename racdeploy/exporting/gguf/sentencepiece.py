"""Read a tokenizer.json in SentencePiece's form: pieces with scores instead of merges.

llama.cpp merges by the highest score, BPE by the earliest merge. They agree if every way to cut a
piece into two pieces is a merge, and all merges of one piece come before or after all of another.
Otherwise merges are written as they are, in the form of Gemma 4: llama.cpp then applies them within
each line and each run of line ends.
Source: llama.cpp ``src/llama-vocab.cpp`` (llm_tokenizer_spm, GEMMA4) and ``conversion/base.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from racdeploy.errors import MissingExtraError, ModelError
from racdeploy.exporting.gguf.pretokenizers import format_steps
from racdeploy.files.reading import Json
from racdeploy.models.bpe import BYTE_PIECES, SPACE
from racdeploy.models.tokenizer_schema import flatten_sequence, read_merges

Encode = Callable[[str], list[int]]
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10_000.0
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


def is_sentencepiece(tokenizer: Json) -> bool:
    """Return True if a tokenizer.json spells unknown characters in bytes, as SentencePiece does."""
    model = tokenizer.get("model") or {}
    return model.get("type", "BPE") == "BPE" and bool(model.get("byte_fallback"))


def adds_space_prefix(tokenizer: Json) -> bool:
    """Return True if a text gets a space in front, also after a special token."""
    normalizer = flatten_sequence(tokenizer.get("normalizer"), "normalizers")
    pre_tokenizer = flatten_sequence(tokenizer.get("pre_tokenizer"), "pretokenizers")

    for normalizers, pre_tokenizers, first in _FORMS:
        if (normalizer, pre_tokenizer) == (normalizers, pre_tokenizers):
            return first
    if not normalizer and _only_replaces_spaces(pre_tokenizer, tokenizer):
        return False

    steps = [str(step.get("type")) for step in (*normalizer, *pre_tokenizer)]
    scheme = ""
    for step in pre_tokenizer:
        if step.get("type") == "Metaspace":
            scheme = f" with prepend_scheme {str(step.get('prepend_scheme'))!r:.40}"
    raise ModelError(
        "unsupported-tokenizer",
        f"llama.cpp has no counterpart for the tokenizer's"
        f" {format_steps(steps) or 'lack of a normalizer'}{scheme}",
        remedy="SentencePiece tokenizers whose normalizer replaces spaces, with or without one put"
        " in front, work",
    )


def _only_replaces_spaces(pre_tokenizer: list[Json], tokenizer: Json) -> bool:
    """Return True for a Metaspace that adds no space in front and whose splits change nothing."""
    match pre_tokenizer:
        case [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", **rest}]:
            crossing = (piece for piece in tokenizer["model"]["vocab"] if SPACE in piece[1:])
            return not rest.get("split", True) or not any(crossing)
    return False


def merges_across_lines(tokenizer: Json) -> bool:
    """Return True if a merge joins the end of a line to other characters."""
    made = map("".join, read_merges(tokenizer["model"]))
    return any("\n" in piece and piece.strip("\n") for piece in made)


def check_merges(tokenizer: Json, added: AbstractSet[str], encode: Encode) -> None:
    """Refuse merges that llama.cpp would apply differently in the form of Gemma 4.

    Args:
        added: texts of added tokens, which are found before any merge.
        encode: returns the ids of a text, by the tokenizers library.
    """
    vocab = tokenizer["model"]["vocab"]
    _check_bytes(vocab)

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


def check_added_tokens(added: Mapping[int, Json], add_space_prefix: bool) -> None:
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


def read_scores(
    tokenizer: Json,
    added: Mapping[int, Json],
    model: Path,
    *,
    has_fallback: bool,
) -> dict[str, float] | None:
    """Return the score of each piece, from ``tokenizer.model`` or the order of the merges.

    Args:
        model: the file ``tokenizer.model``, which may be missing.
        has_fallback: return None, do not raise, if llama.cpp would merge differently.

    Raises:
        ModelError: llama.cpp would merge differently by these scores.
    """
    vocab = tokenizer["model"]["vocab"]
    merges = list(read_merges(tokenizer["model"]))
    _check_bytes(vocab)

    texts = {token["content"] for token in added.values()}
    # Refuse pieces that llama.cpp cannot build from characters of the vocabulary.
    for piece in vocab.keys() - BYTE_PIECES - texts:
        unknown = [character for character in piece if character not in vocab]
        if len(piece) > 1 and unknown:
            raise ModelError(
                "unsupported-tokenizer",
                f"the token {piece!r} holds {unknown[0]!r}, which the tokenizer's vocabulary lacks",
            )

    # Without tokenizer.model, the order of the merges gives the scores.
    made = [left + right for left, right in merges]
    scores = (
        _read_stored_scores(model, vocab, added)
        if model.is_file()
        else dict.fromkeys(vocab, 0.0) | score_by_rank(made)
    )

    wrong = _find_wrong_join(vocab, set(merges), texts)
    wrong = wrong or _find_wrong_order([(piece, scores[piece]) for piece in made], texts)
    if wrong and has_fallback:
        return None
    if wrong:
        raise wrong
    return scores


def _check_bytes(vocab: Mapping[str, int]) -> None:
    if missing := sorted(BYTE_PIECES - vocab.keys()):
        raise ModelError(
            "unsupported-tokenizer",
            f"the tokenizer spells unknown characters in bytes and has no token {missing[0]!r}",
        )


def _find_wrong_join(
    vocab: Mapping[str, int], merges: set[tuple[str, str]], added: set[str]
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


def _find_wrong_order(made: Sequence[tuple[str, float]], added: set[str]) -> ModelError | None:
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
