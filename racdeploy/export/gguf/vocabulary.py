"""Read a tokenizer.json, byte-level BPE or in SentencePiece's form, into what a GGUF file stores of it.

``tokenizer.json`` is the truth: tokenizer classes of transformers 4 and 5 replace parts of it. Token types
and merges follow llama.cpp's own converter. Special ids come from tokenizer_config.json, then config.json and
generation_config.json.
Source: llama.cpp ``conversion/base.py`` (get_vocab_base) and ``gguf-py/gguf/vocab.py`` (SpecialVocab).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer  # type: ignore[import-untyped]

from racdeploy.errors import ModelError
from racdeploy.export.gguf import sentencepiece as pieces
from racdeploy.export.gguf.pretokenizers import find_pre_tokenizer, flatten, normalizer_note
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import token_ids, token_text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = ("bos", "eos", "pad", "unk")
# Texts that llama.cpp takes for an end of generation without being told.
_KNOWN_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>",
    "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What ``tokenizer.ggml.*`` holds.

    Args:
        model: llama.cpp's name of the kind: ``gpt2`` is byte-level BPE, ``llama`` is SentencePiece.
        tokens: byte-mapped text of every id, as many as the embedding has rows; pieces of SentencePiece as they are.
        types: llama.cpp's token type of every id.
        merges: ``left right``, best first; empty for SentencePiece.
        scores: of every id; empty for byte-level BPE.
        space_first: whether a text gets a space in front; None for byte-level BPE.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer.
        special_ids: ``bos``, ``eos``, ``pad``, ``unk``, ``eot`` → id, where there is one.
        adds: ``bos`` and ``eos`` → whether encoding adds it.
        notes: what llama.cpp will do differently, in sentences.
    """

    model: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    space_first: bool | None
    pre_tokenizer: str
    special_ids: Mapping[str, int]
    adds: Mapping[str, bool]
    notes: tuple[str, ...]


def read_vocabulary(checkpoint: Checkpoint, pre_tokenizer: str | None = None) -> Vocabulary:
    """Read the tokenizer of a checkpoint.

    Args:
        checkpoint: the model folder.
        pre_tokenizer: overrides the name derived from tokenizer.json.

    Raises:
        ModelError: not a byte-level BPE tokenizer, an unknown pre-tokenizer, or a damaged vocabulary.
    """
    tokenizer = checkpoint.tokenizer.parsed
    _check_kind(tokenizer)
    added = _added_tokens(tokenizer)
    by_id = _texts_by_id(tokenizer["model"]["vocab"], added)
    _check_ids(checkpoint, by_id)
    size = checkpoint.integer("vocab_size")
    if by_id and max(by_id) >= size:
        raise ModelError(
            f"tokenizer.json has token id {max(by_id)}, but the model's vocabulary ends at {size - 1}",
            remedy="the tokenizer belongs to another model, or the embedding was not resized",
        )
    special_ids, notes = _special_ids(checkpoint, by_id)
    notes = [*_stripping_notes(added), *notes]
    if pieces.is_sentencepiece(tokenizer):
        return _sentencepiece(checkpoint, tokenizer, added, by_id, special_ids, notes)
    return Vocabulary(
        model="gpt2",
        tokens=_tokens(by_id, size),
        types=tuple(_type(i, by_id, added) for i in range(size)),
        merges=tuple(_merges(tokenizer["model"]["merges"])),
        scores=(),
        space_first=None,
        pre_tokenizer=pre_tokenizer or find_pre_tokenizer(tokenizer),
        special_ids=special_ids,
        adds=_adds(
            tokenizer, checkpoint.tokenizer.config, special_ids, by_id, {"bos": False, "eos": False}
        ),
        notes=(*filter(None, [normalizer_note(tokenizer)]), *notes),
    )


def adds_bos(checkpoint: Checkpoint) -> bool:
    """Return whether llama.cpp's tokenizer puts the beginning-of-sequence in front of a text by itself."""
    tokenizer = checkpoint.tokenizer.parsed
    _check_kind(tokenizer)
    by_id = _texts_by_id(tokenizer["model"]["vocab"], _added_tokens(tokenizer))
    special_ids, _ = _special_ids(checkpoint, by_id)
    usual = {"bos": pieces.is_sentencepiece(tokenizer), "eos": False}
    return _adds(tokenizer, checkpoint.tokenizer.config, special_ids, by_id, usual)["bos"]


def _sentencepiece(
    checkpoint: Checkpoint,
    tokenizer: Mapping[str, Any],
    added: Mapping[int, dict[str, Any]],
    by_id: Mapping[int, str],
    special_ids: Mapping[str, int],
    notes: list[str],
) -> Vocabulary:
    """Read a tokenizer in SentencePiece's form; the scores stand for the merges."""
    space_first = pieces.puts_space_first(tokenizer)
    altered = [
        t["content"]
        for t in added.values()
        if t.get("normalized") and (space_first or " " in t["content"])
    ]
    if altered:
        raise ModelError(
            f"the tokenizer looks for its added token {altered[0]!r} in normalized text, llama.cpp in the text itself",
            remedy='set "normalized": false for it in tokenizer.json',
        )
    spaces = [
        t["content"]
        for t in added.values()
        if not t.get("special") and pieces.SPACE in t["content"]
    ]
    if space_first and spaces:
        raise ModelError(
            f"llama.cpp finds the added token {spaces[0]!r} before it puts a space first, not after"
        )
    scores = pieces.read_scores(tokenizer, added, checkpoint.folder / "tokenizer.model")
    size, unknown = checkpoint.integer("vocab_size"), tokenizer["model"].get("unk_token")
    types, values = [], []
    for i in range(size):
        text, kind = by_id.get(i), _type(i, by_id, added)
        if kind == NORMAL:
            kind = BYTE if text in pieces.BYTES else UNKNOWN if text == unknown else NORMAL
        types.append(kind)
        values.append(
            pieces.ADDED_SCORE if i in added else scores.get(text or "", pieces.UNUSED_SCORE)
        )
    # llama.cpp looks for these in the text before spaces are replaced
    spaced = {
        i: t.replace(pieces.SPACE, " ") if types[i] == USER_DEFINED else t for i, t in by_id.items()
    }
    return Vocabulary(
        model="llama",
        tokens=_tokens(spaced, size),
        types=tuple(types),
        merges=(),
        scores=tuple(values),
        space_first=space_first,
        pre_tokenizer="default",
        special_ids=special_ids,
        adds=_adds(
            tokenizer, checkpoint.tokenizer.config, special_ids, by_id, {"bos": True, "eos": False}
        ),
        notes=tuple(notes),
    )


def _tokens(by_id: Mapping[int, str], size: int) -> tuple[str, ...]:
    tokens = tuple(by_id.get(i, f"[PAD{i}]") for i in range(size))
    if len(set(tokens)) != size:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise ModelError(
            f"tokenizer.json has two ids for the token {twice!r}, which llama.cpp cannot load"
        )
    return tokens


def check_name(name: str, vocabulary: Vocabulary) -> None:
    """Refuse a model name by which llama.cpp would look for tokens that are not there.

    Source: llama.cpp ``src/llama-vocab.cpp``, attributes set by the model's name.
    """
    asks = next((part for part in ("phi-3", "phi3") if part in name.lower()), None)
    missing = [
        text for text in ("</s>", "<unk>", "<s>", "<|endoftext|>") if text not in vocabulary.tokens
    ]
    if asks and missing:
        raise ModelError(
            f"the name {name!r} holds {asks!r}, so llama.cpp asks for a token {missing[0]!r} and fails without it",
            remedy="rename the model's folder",
        )


def _check_kind(tokenizer: Mapping[str, Any]) -> None:
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        raise ModelError("tokenizer.json is damaged: it has no model")
    kind = model.get("type", "BPE")
    bytes_mapped = '"ByteLevel"' in str(tokenizer.get("pre_tokenizer")).replace("'", '"')
    if not pieces.is_sentencepiece(tokenizer) and (kind != "BPE" or not bytes_mapped):
        raise ModelError(
            f"a tokenizer of type {kind} without byte-level pre-tokenization or byte fallback has no GGUF form yet",
            remedy="byte-level BPE works (Qwen, Llama 3, SmolLM, Granite), and SentencePiece BPE (Mistral 7B, Gemma)",
        )
    usual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    unusual = [
        key
        for key in (*usual, *(["ignore_merges"] if model.get("byte_fallback") else []))
        if model.get(key)
    ]
    if unusual:
        raise ModelError(f"llama.cpp has no counterpart for the tokenizer's {', '.join(unusual)}")
    if not isinstance(model.get("vocab"), dict) or not (
        model.get("merges") and isinstance(model["merges"], list)
    ):
        raise ModelError("tokenizer.json is damaged: its model has no vocab or no merges")


def _added_tokens(tokenizer: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    try:
        return {
            int(token["id"]): token | {"content": str(token["content"])}
            for token in tokenizer["added_tokens"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            "tokenizer.json is damaged: added_tokens has an entry without id or content"
        ) from error


def _texts_by_id(vocab: Mapping[str, Any], added: Mapping[int, dict[str, Any]]) -> dict[int, str]:
    by_id: dict[int, str] = {}
    for text, i in vocab.items():
        if not isinstance(i, int) or isinstance(i, bool) or i < 0:
            raise ModelError(f"tokenizer.json is damaged: token {text!r} has id {i!r}")
        if by_id.setdefault(i, text) != text:
            raise ModelError(
                f"tokenizer.json is damaged: id {i} has two tokens, {by_id[i]!r} and {text!r}"
            )
    return by_id | {i: str(token["content"]) for i, token in added.items()}


def _check_ids(checkpoint: Checkpoint, by_id: Mapping[int, str]) -> None:
    """Refuse a file whose ids the tokenizers library, which counts added tokens itself, does not follow."""
    try:
        assigned = Tokenizer.from_file(str(checkpoint.tokenizer.file)).get_vocab(
            with_added_tokens=True
        )
    except (
        Exception
    ) as error:  # tokenizers raises bare Exception for whatever its Rust code refuses
        raise ModelError(f"{checkpoint.tokenizer.file} cannot be loaded: {error}") from error
    for i, text in by_id.items():
        if assigned.get(text) != i:
            raise ModelError(
                f"{checkpoint.tokenizer.file} gives the token {text!r} the id {i}, but it loads as"
                f" {assigned.get(text)}",
                remedy="ids of added tokens must follow the vocabulary without a gap",
            )


def _type(i: int, by_id: Mapping[int, str], added: Mapping[int, dict[str, Any]]) -> int:
    if i not in by_id:
        return UNUSED
    if i not in added:
        return NORMAL
    return CONTROL if added[i].get("special") or _looks_special(by_id[i]) else USER_DEFINED


def _looks_special(text: str) -> bool:
    """Return whether llama.cpp's converter takes a token for a control token by its text."""
    pairs = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    named = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return named or any(text.startswith(start) and text.endswith(end) for start, end in pairs)


def _merges(merges: list[Any]) -> Iterator[str]:
    """Yield ``left right``; a space inside a part is written as byte-level BPE maps it."""
    for merge in merges:
        match merge:
            case str() if merge.count(" ") == 1:
                yield merge
            case [str(left), str(right)]:
                yield f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}"
            case _:
                raise ModelError(f"tokenizer.json is damaged: {merge!r} is not a merge")


def _special_ids(
    checkpoint: Checkpoint, by_id: Mapping[int, str]
) -> tuple[dict[str, int], list[str]]:
    generation = checkpoint.tokenizer.generation
    to_id: dict[str | None, int] = {text: i for i, text in by_id.items()}
    found: dict[str, int] = {}
    for kind in _SPECIAL:
        named = to_id.get(token_text(checkpoint.tokenizer.config.get(f"{kind}_token")))
        numbered = [*token_ids(checkpoint.config, kind), *token_ids(generation, kind)]
        candidates = ([] if named is None else [named]) + [i for i in numbered if i in by_id]
        if candidates:
            found[kind] = candidates[0]
    if "eos" not in found:
        raise ModelError(
            f"{checkpoint.folder} names no end-of-sequence token; llama.cpp would stop at an arbitrary one",
            remedy="set eos_token in tokenizer_config.json",
        )
    ends = dict.fromkeys([*token_ids(generation, "eos"), *token_ids(checkpoint.config, "eos")])
    unknown = [i for i in ends if i in by_id and i != found["eos"] and by_id[i] not in _KNOWN_ENDS]
    if unknown:
        found["eot"] = unknown[0]
    return found, [
        f"llama.cpp will not stop at token {by_id[i]!r}, the checkpoint does" for i in unknown[1:]
    ]


def _adds(
    tokenizer: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    special_ids: Mapping[str, int],
    by_id: Mapping[int, str],
    usual: Mapping[str, bool],
) -> dict[str, bool]:
    """Return whether encoding adds bos and eos: the post-processor decides, else tokenizer_config.json, else habit."""
    processors = flatten(tokenizer.get("post_processor"), "processors")
    if not processors:
        asked = {
            kind: tokenizer_config.get(f"add_{kind}_token", usual[kind]) is True
            for kind in ("bos", "eos")
        }
        return {kind: adds and kind in special_ids for kind, adds in asked.items()}
    texts: list[str | None] = []
    for processor in processors:
        if processor.get("type") == "TemplateProcessing" and isinstance(
            processor.get("single"), list
        ):
            texts = [_template_text(part) for part in processor["single"]]
    special = {kind: by_id[i] for kind, i in special_ids.items()}
    return {
        "bos": len(texts) > 1 and texts[0] is not None and texts[0] == special.get("bos"),
        "eos": len(texts) > 1 and texts[-1] is not None and texts[-1] == special.get("eos"),
    }


def _template_text(part: object) -> str | None:
    match part:
        case {"SpecialToken": {"id": str(text)}}:
            return text
    return None


def _stripping_notes(added: Mapping[int, dict[str, Any]]) -> Iterator[str]:
    stripping = [
        t["content"]
        for t in added.values()
        if t.get("lstrip") or t.get("rstrip") or t.get("single_word")
    ]
    if stripping:
        yield f"llama.cpp strips no white space around {len(stripping)} added tokens, as {stripping[0]!r}"
