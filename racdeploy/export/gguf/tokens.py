"""The tokens of a tokenizer.json, checked: the text, the id and llama.cpp's type of each.

``tokenizer.json`` is the truth: tokenizer classes of transformers 4 and 5 replace parts of it.
Source: llama.cpp ``conversion/base.py`` (get_vocab_base).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from racdeploy.errors import ModelError
from racdeploy.export.gguf.sentencepiece import is_sentencepiece
from racdeploy.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Tokens:
    """The tokens of a tokenizer.json.

    Args:
        tokenizer: the parsed file.
        added: its added tokens by id.
        texts: of all tokens, by id.
    """

    tokenizer: Mapping[str, Any]
    added: Mapping[int, Mapping[str, Any]]
    texts: Mapping[int, str]

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Tokens:
        """Read the tokens of a checkpoint.

        Raises:
            ModelError: llama.cpp has no counterpart of the tokenizer, or its file is damaged.
        """
        tokenizer = checkpoint.tokenizer.parsed
        _check_kind(tokenizer)
        added = _read_added(tokenizer)
        texts = _read_vocabulary(tokenizer["model"]["vocab"])
        texts |= {i: str(token["content"]) for i, token in added.items()}
        return cls(tokenizer, added, texts)

    def check_ids(self, checkpoint: Checkpoint) -> None:
        """Refuse ids that the tokenizers library does not follow: it counts added tokens itself."""
        file = checkpoint.tokenizer.file
        try:
            loaded = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises a bare Exception for whatever it refuses
            raise ModelError(f"{file} cannot be loaded: {error}") from error

        assigned = loaded.get_vocab(with_added_tokens=True)
        for i, text in self.texts.items():
            if assigned.get(text) != i:
                raise ModelError(
                    f"{file} gives the token {text!r} the id {i}, but it loads as"
                    f" {assigned.get(text)}",
                    remedy="ids of added tokens must follow the vocabulary without a gap",
                )

        size = checkpoint.integer("vocab_size")
        if self.texts and max(self.texts) >= size:
            raise ModelError(
                f"tokenizer.json has token id {max(self.texts)}, but the model's vocabulary ends at"
                f" {size - 1}",
                remedy="the tokenizer belongs to another model, or the embedding was not resized",
            )

    def type_of(self, i: int) -> TokenType:
        """Return llama.cpp's type of an id."""
        if i not in self.texts:
            return TokenType.UNUSED
        if i not in self.added:
            return TokenType.NORMAL
        if self.added[i].get("special") or _looks_special(self.texts[i]):
            return TokenType.CONTROL
        return TokenType.USER_DEFINED


def _check_kind(tokenizer: Mapping[str, Any]) -> None:
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        raise ModelError("tokenizer.json is damaged: it has no model")

    kind = model.get("type", "BPE")
    maps_bytes = '"ByteLevel"' in str(tokenizer.get("pre_tokenizer")).replace("'", '"')
    if not is_sentencepiece(tokenizer) and (kind != "BPE" or not maps_bytes):
        raise ModelError(
            f"a tokenizer of type {kind} without byte-level pre-tokenization or byte fallback has"
            " no GGUF form yet",
            remedy="byte-level BPE works (Qwen, Llama 3, SmolLM, Granite), and SentencePiece BPE"
            " (Mistral 7B, Gemma)",
        )

    lacking = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    if model.get("byte_fallback"):
        lacking.append("ignore_merges")
    if unusual := [key for key in lacking if model.get(key)]:
        raise ModelError(f"llama.cpp has no counterpart for the tokenizer's {', '.join(unusual)}")

    merges = model.get("merges")
    if not isinstance(model.get("vocab"), dict) or not isinstance(merges, list) or not merges:
        raise ModelError("tokenizer.json is damaged: its model has no vocab or no merges")


def _read_added(tokenizer: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    try:
        return {
            int(token["id"]): token | {"content": str(token["content"])}
            for token in tokenizer["added_tokens"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            "tokenizer.json is damaged: added_tokens has an entry without id or content"
        ) from error


def _read_vocabulary(vocab: Mapping[str, Any]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for text, i in vocab.items():
        if not isinstance(i, int) or isinstance(i, bool) or i < 0:
            raise ModelError(f"tokenizer.json is damaged: token {text!r} has id {i!r}")
        if texts.setdefault(i, text) != text:
            raise ModelError(
                f"tokenizer.json is damaged: id {i} has two tokens, {texts[i]!r} and {text!r}"
            )
    return texts


def _looks_special(text: str) -> bool:
    """Return whether llama.cpp's converter takes a token for a control token by its text."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    pairs = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(text.startswith(start) and text.endswith(end) for start, end in pairs)
