"""Which tokens begin and end a text, and whether encoding adds them, as llama.cpp needs to know it.

Ids come from tokenizer_config.json, then config.json and generation_config.json.
Source: ``gguf-py/gguf/vocab.py`` (SpecialVocab).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from racdeploy.errors import ModelError
from racdeploy.export.gguf.pretokenizers import flatten
from racdeploy.export.gguf.sentencepiece import is_sentencepiece
from racdeploy.export.gguf.tokens import Tokens
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import token_ids, token_text

# Texts that llama.cpp takes for an end of generation by itself.
_KNOWN_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]",
}  # fmt: skip


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a model.

    Args:
        ids: ``bos``, ``eos``, ``pad``, ``unk``, ``eot`` → id, where there is one.
        adds: ``bos`` and ``eos`` → whether encoding adds it.
        ignored_ends: texts at which the checkpoint stops and llama.cpp will not.
    """

    ids: Mapping[str, int]
    adds: Mapping[str, bool]
    ignored_ends: tuple[str, ...]


def read_special_tokens(checkpoint: Checkpoint, tokens: Tokens) -> SpecialTokens:
    """Read the special tokens of a checkpoint.

    Raises:
        ModelError: it names no end of sequence.
    """
    ids = _read_ids(checkpoint, tokens)
    if "eos" not in ids:
        raise ModelError(
            f"{checkpoint.folder} names no end-of-sequence token; llama.cpp would stop at an"
            " arbitrary one",
            remedy="set eos_token in tokenizer_config.json",
        )

    # A file can name one end that llama.cpp does not know by its text; it stops at no others.
    generation = checkpoint.tokenizer.generation
    ends = dict.fromkeys([*token_ids(generation, "eos"), *token_ids(checkpoint.config, "eos")])
    unknown = [
        i
        for i in ends
        if i in tokens.texts and i != ids["eos"] and tokens.texts[i] not in _KNOWN_ENDS
    ]
    if unknown:
        ids["eot"] = unknown[0]

    ignored_ends = tuple(tokens.texts[i] for i in unknown[1:])
    return SpecialTokens(ids, _read_adds(checkpoint, tokens, ids), ignored_ends)


def _read_ids(checkpoint: Checkpoint, tokens: Tokens) -> dict[str, int]:
    files = checkpoint.tokenizer
    to_id: dict[str | None, int] = {text: i for i, text in tokens.texts.items()}
    found: dict[str, int] = {}
    for kind in ("bos", "eos", "pad", "unk"):
        named = to_id.get(token_text(files.config.get(f"{kind}_token")))
        numbered = [*token_ids(checkpoint.config, kind), *token_ids(files.generation, kind)]
        candidates = [i for i in (named, *numbered) if i is not None and i in tokens.texts]
        if candidates:
            found[kind] = candidates[0]
    return found


def _read_adds(checkpoint: Checkpoint, tokens: Tokens, ids: Mapping[str, int]) -> dict[str, bool]:
    """Return whether encoding adds bos and eos: by the post-processor, else by the config."""
    tokenizer = tokens.tokenizer
    processors = flatten(tokenizer.get("post_processor"), "processors")
    if not processors:
        config = checkpoint.tokenizer.config
        usual = {"bos": is_sentencepiece(tokenizer), "eos": False}
        asked = {kind: config.get(f"add_{kind}_token", usual[kind]) for kind in usual}
        return {kind: adds is True and kind in ids for kind, adds in asked.items()}

    written: list[str | None] = []
    for processor in processors:
        single = processor.get("single")
        if processor.get("type") == "TemplateProcessing" and isinstance(single, list):
            written = [_template_token(part) for part in single]

    first, last = (written[0], written[-1]) if len(written) > 1 else (None, None)
    return {
        "bos": first is not None and first == tokens.texts.get(ids.get("bos", -1)),
        "eos": last is not None and last == tokens.texts[ids["eos"]],
    }


def _template_token(part: object) -> str | None:
    """Return the token that a part of a template adds; None for the text itself."""
    match part:
        case {"SpecialToken": {"id": str(text)}}:
            return text
    return None
