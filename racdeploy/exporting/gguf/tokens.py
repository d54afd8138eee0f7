"""Read the tokens of tokenizer.json, without tokenizer classes, and the special tokens.

Source: llama.cpp ``conversion/base.py`` (get_vocab_base), ``gguf-py/gguf/vocab.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from gguf import TokenType

from racdeploy.errors import ArtifactError, ModelError
from racdeploy.files.reading import Json
from racdeploy.models.bpe import BYTE_PIECES, SPACE, Pair
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import find_token_ids, token_text
from racdeploy.models.tokenizer_schema import flatten_sequence, read_merges

# Tokens at which llama.cpp stops without being told.
_KNOWN_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]",
}  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """A parsed tokenizer.json: its tokens, merges and steps.

    Args:
        added: entries of added tokens, by id.
        texts: of all tokens, by id.
        merges: the best first.
        normalizers, pre_tokenizers, post_processors: steps, without the sequences that hold them.
        is_sentencepiece: unknown characters are spelled in bytes, as SentencePiece does.
    """

    tokenizer: Json
    added: Mapping[int, Json]
    texts: Mapping[int, str]
    merges: tuple[Pair, ...]
    normalizers: list[Json]
    pre_tokenizers: list[Json]
    post_processors: list[Json]
    is_sentencepiece: bool

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Tokens:
        """Read the tokens of a checkpoint, or refuse an unsupported tokenizer."""
        tokenizer = checkpoint.tokenizer.tokenizer_json
        model = tokenizer.get("model") or {}
        is_bpe = model.get("type", "BPE") == "BPE"
        is_sentencepiece = is_bpe and bool(model.get("byte_fallback"))
        _check_kind(tokenizer, is_sentencepiece)

        texts: dict[int, str] = {}
        for text, i in model["vocab"].items():
            if texts.setdefault(i, text) != text:
                raise ArtifactError(
                    "damaged-tokenizer",
                    f"tokenizer.json is damaged: id {i} has two tokens, {texts[i]!r} and {text!r}",
                )

        added = {token["id"]: token for token in tokenizer.get("added_tokens") or []}
        texts |= {i: token["content"] for i, token in added.items()}
        return cls(
            tokenizer=tokenizer,
            added=added,
            texts=texts,
            merges=tuple(read_merges(model)),
            normalizers=flatten_sequence(tokenizer.get("normalizer"), "normalizers"),
            pre_tokenizers=flatten_sequence(tokenizer.get("pre_tokenizer"), "pretokenizers"),
            post_processors=flatten_sequence(tokenizer.get("post_processor"), "processors"),
            is_sentencepiece=is_sentencepiece,
        )

    @property
    def vocab(self) -> Mapping[str, int]:
        """Ids of the model's tokens, by their texts."""
        vocab: Mapping[str, int] = self.tokenizer["model"]["vocab"]
        return vocab

    @property
    def added_texts(self) -> frozenset[str]:
        """Texts of the added tokens."""
        return frozenset(token["content"] for token in self.added.values())

    def check_size(self, size: int) -> None:
        """Refuse ids that a model with this vocabulary does not have."""
        if self.texts and max(self.texts) >= size:
            raise ModelError(
                "token-outside-vocabulary",
                f"tokenizer.json has token id {max(self.texts)}, but the model's vocabulary ends at"
                f" {size - 1}",
                remedy="the tokenizer belongs to another model, or the embedding was not resized",
            )

    def type_of(self, token_id: int) -> TokenType:
        """Return llama.cpp's token type of an id."""
        if token_id not in self.texts:
            return TokenType.UNUSED
        if token_id not in self.added:
            return self._piece_type(self.texts[token_id])
        if self.added[token_id].get("special") or _looks_special(self.texts[token_id]):
            return TokenType.CONTROL
        return TokenType.USER_DEFINED

    def _piece_type(self, text: str) -> TokenType:
        if self.is_sentencepiece and text in BYTE_PIECES:
            return TokenType.BYTE
        if self.is_sentencepiece and text == self.tokenizer["model"].get("unk_token"):
            return TokenType.UNKNOWN
        return TokenType.NORMAL

    def list_types(self, size: int) -> tuple[TokenType, ...]:
        """Return the type of each row of an embedding."""
        return tuple(map(self.type_of, range(size)))

    def list_texts(self, size: int, *, plain_spaces: bool = False) -> tuple[str, ...]:
        """Return the text of each row of an embedding; see :func:`fill_gaps`.

        Args:
            plain_spaces: user-defined tokens get spaces in place of SentencePiece's, since
                llama.cpp searches them before it replaces spaces.
        """
        texts = dict(self.texts)
        if plain_spaces:
            for i, text in self.texts.items():
                if self.type_of(i) == TokenType.USER_DEFINED:
                    texts[i] = text.replace(SPACE, " ")
        return fill_gaps(texts, size)


def fill_gaps(texts: Mapping[int, str], size: int) -> tuple[str, ...]:
    """Return a text for each row of the embedding; rows without a token get llama.cpp's name."""
    filled = tuple(texts.get(i, f"[PAD{i}]") for i in range(size))
    if len(set(filled)) != size:
        [(repeated, _)] = Counter(filled).most_common(1)
        raise ModelError(
            "unsupported-tokenizer",
            f"tokenizer.json has two ids for the token {repeated!r}, which llama.cpp cannot load",
        )
    return filled


def _check_kind(tokenizer: Json, is_sentencepiece: bool) -> None:
    model = tokenizer.get("model")
    if model is None:
        raise ArtifactError("damaged-tokenizer", "tokenizer.json is damaged: it has no model")

    kind = model.get("type", "BPE")
    if kind == "Unigram" and model.get("byte_fallback"):
        raise ModelError(
            "unsupported-tokenizer",
            "llama.cpp's Unigram writes one unknown token for characters outside the vocabulary,"
            " where this tokenizer writes their bytes",
            remedy="export to ONNX, whose programs read tokenizer.json: --target onnx",
        )

    maps_bytes = "'ByteLevel'" in str(tokenizer.get("pre_tokenizer"))
    if not is_sentencepiece and (kind != "BPE" or not maps_bytes):
        raise ModelError(
            "unsupported-tokenizer",
            f"a tokenizer of type {str(kind)[:40]!r} without byte-level pre-tokenization or byte"
            " fallback has no GGUF form yet",
            remedy="byte-level BPE works (Qwen, Llama 3, SmolLM, Granite), and SentencePiece BPE"
            " (Mistral 7B, Gemma)",
        )

    lacking = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    if model.get("byte_fallback"):
        lacking.append("ignore_merges")

    if unusual := [key for key in lacking if model.get(key)]:
        raise ModelError(
            "unsupported-tokenizer",
            f"llama.cpp has no counterpart for the tokenizer's {', '.join(unusual)}",
        )

    if model.get("vocab") is None or not model.get("merges"):
        raise ArtifactError(
            "damaged-tokenizer", "tokenizer.json is damaged: its model has no vocab or no merges"
        )


def _looks_special(text: str) -> bool:
    """Return True if llama.cpp's converter treats a token as a control token by its text."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    pairs = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(text.startswith(start) and text.endswith(end) for start, end in pairs)


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens of a GGUF file.

    Args:
        ids: by ``bos``, ``eos``, ``pad``, ``unk`` and ``eot``.
        adds: by ``bos`` and ``eos``, True if encoding adds it.
        notes: sentences on what llama.cpp does otherwise with added and special tokens.
    """

    ids: Mapping[str, int]
    adds: Mapping[str, bool]
    notes: tuple[str, ...]


def read_special_tokens(checkpoint: Checkpoint, tokens: Tokens) -> SpecialTokens:
    """Read the special tokens: tokenizer_config.json first, then the configs of the model."""
    notes = _note_stripping(tokens)
    files = checkpoint.tokenizer
    id_by_text: dict[str | None, int] = {text: i for i, text in tokens.texts.items()}

    # The first file that names a known token decides.
    ids: dict[str, int] = {}
    for kind in ("bos", "eos", "pad", "unk"):
        named = id_by_text.get(token_text(files.config.get(f"{kind}_token")))
        numbered = find_token_ids(checkpoint.config, kind) + find_token_ids(files.generation, kind)
        for i in (named, *numbered):
            if i is not None and i in tokens.texts:
                ids.setdefault(kind, i)

    if "eos" not in ids:
        raise ModelError(
            "no-eos-token",
            f"{checkpoint.folder} names no end-of-sequence token; llama.cpp would stop at an"
            " arbitrary one",
            remedy="set eos_token in tokenizer_config.json",
        )

    # A GGUF file can name one more end, eot, beside those that llama.cpp knows by their texts.
    ends = find_token_ids(files.generation, "eos") + find_token_ids(checkpoint.config, "eos")

    for i in dict.fromkeys(ends):
        text = tokens.texts.get(i)
        if text is None or i == ids["eos"] or text in _KNOWN_ENDS:
            continue
        if ids.setdefault("eot", i) != i:
            notes.append(f"llama.cpp does not stop at token {text!r}, the checkpoint does")

    return SpecialTokens(ids, _read_adds(checkpoint, tokens, ids), tuple(notes))


def _note_stripping(tokens: Tokens) -> list[str]:
    """Return a sentence on added tokens that take white space beside them, if there are any."""
    stripping = [
        token["content"]
        for token in tokens.added.values()
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    ]
    if not stripping:
        return []
    return [
        f"llama.cpp strips no white space around {len(stripping)} added tokens, as {stripping[0]!r}"
    ]


def _read_adds(checkpoint: Checkpoint, tokens: Tokens, ids: Mapping[str, int]) -> dict[str, bool]:
    """Return for bos and eos if encoding adds them: by the post-processor, else by the config."""
    # The post-processor decides, if there is one: the tokenizers library reads no config.
    if not tokens.post_processors:
        config = checkpoint.tokenizer.config
        usual = {"bos": tokens.is_sentencepiece, "eos": False}
        configured = {kind: config.get(f"add_{kind}_token", usual[kind]) for kind in usual}
        return {kind: adds is True and kind in ids for kind, adds in configured.items()}

    adds = {"bos": False, "eos": False}
    for processor in tokens.post_processors:
        match processor:
            case {"type": "TemplateProcessing", "single": [first, *_, last]}:
                adds = {
                    "bos": "bos" in ids and _adds_token(first, tokens.texts[ids["bos"]]),
                    "eos": _adds_token(last, tokens.texts[ids["eos"]]),
                }
            case {"type": "TemplateProcessing", "single": list()}:
                adds = {"bos": False, "eos": False}

    return adds


def _adds_token(part: object, text: str) -> bool:
    match part:
        case {"SpecialToken": {"id": str(added)}}:
            return added == text
    return False
