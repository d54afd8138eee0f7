"""Read the tokens of tokenizer.json, without tokenizer classes, and the special tokens.

Source: llama.cpp ``conversion/base.py`` (get_vocab_base), ``gguf-py/gguf/vocab.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf import TokenType

from racdeploy.errors import ArtifactError, ModelError
from racdeploy.exporting.gguf.sentencepiece import is_sentencepiece
from racdeploy.files.reading import Json
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import check_ids, find_token_ids, read_tokenizer, token_text
from racdeploy.models.tokenizer_schema import flatten_sequence

# Tokens at which llama.cpp stops without being told.
_KNOWN_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]",
}  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """Tokens of a parsed tokenizer.json: those added, and the texts of all, by id."""

    tokenizer: Json
    added: Mapping[int, Json]
    texts: Mapping[int, str]

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Tokens:
        """Read the tokens of a checkpoint, or refuse an unsupported tokenizer."""
        tokenizer = checkpoint.tokenizer.tokenizer_json
        _check_kind(tokenizer)
        added = {token["id"]: token for token in tokenizer.get("added_tokens") or []}

        texts: dict[int, str] = {}
        for text, i in tokenizer["model"]["vocab"].items():
            if texts.setdefault(i, text) != text:
                raise ArtifactError(
                    "damaged-tokenizer",
                    f"tokenizer.json is damaged: id {i} has two tokens, {texts[i]!r} and {text!r}",
                )

        texts |= {i: token["content"] for i, token in added.items()}
        return cls(tokenizer, added, texts)

    def check_ids(self, checkpoint: Checkpoint) -> None:
        """Refuse ids that the tokenizers library assigns differently or the model does not have."""
        file = checkpoint.tokenizer.file
        check_ids(file, self.texts.items(), read_tokenizer(file).get_vocab(with_added_tokens=True))

        size = checkpoint.shape.vocab_size
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
            return TokenType.NORMAL
        if self.added[token_id].get("special") or _looks_special(self.texts[token_id]):
            return TokenType.CONTROL
        return TokenType.USER_DEFINED


def _check_kind(tokenizer: Json) -> None:
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
    if not is_sentencepiece(tokenizer) and (kind != "BPE" or not maps_bytes):
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
        ignored_eos: tokens at which the checkpoint stops and llama.cpp will not.
    """

    ids: Mapping[str, int]
    adds: Mapping[str, bool]
    ignored_eos: tuple[str, ...]


def read_special_tokens(checkpoint: Checkpoint, tokens: Tokens) -> SpecialTokens:
    """Read the special tokens: tokenizer_config.json first, then the configs of the model."""
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

    ignored = []
    for i in dict.fromkeys(ends):
        text = tokens.texts.get(i)
        if text is None or i == ids["eos"] or text in _KNOWN_ENDS:
            continue
        if ids.setdefault("eot", i) != i:
            ignored.append(text)

    return SpecialTokens(ids, _read_adds(checkpoint, tokens, ids), tuple(ignored))


def _read_adds(checkpoint: Checkpoint, tokens: Tokens, ids: Mapping[str, int]) -> dict[str, bool]:
    """Return for bos and eos if encoding adds them: by the post-processor, else by the config."""
    # The post-processor decides, if there is one: the tokenizers library reads no config.
    tokenizer = tokens.tokenizer
    processors = flatten_sequence(tokenizer.get("post_processor"), "processors")
    if not processors:
        config = checkpoint.tokenizer.config
        usual = {"bos": is_sentencepiece(tokenizer), "eos": False}
        configured = {kind: config.get(f"add_{kind}_token", usual[kind]) for kind in usual}
        return {kind: adds is True and kind in ids for kind, adds in configured.items()}

    adds = {"bos": False, "eos": False}
    for processor in processors:
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
