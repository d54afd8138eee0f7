"""tokenizer.json, as prompts, the cutting of vocabularies and the export to GGUF read it.

It is loaded and used in this process; one in a hundred, and each that reaches a limit, in a process
of its own too, which gives the same ids and texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from racdeploy.errors import RacdeployError
from racdeploy.exporting.gguf.tokenizer import read_vocabulary
from racdeploy.models.bpe import BytePairs
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.renumbering import find_config_ids, renumber_files
from racdeploy.models.tokenizer_files import TokenizerFiles
from racdeploy.runtime.control import find_hesitation_ids
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.sandbox import tokenizer
from racdeploy.sandbox.client import Sandbox
from tests.fuzz.in_process import InProcess, reaches_limits
from tests.fuzz.mutation import of_json
from tests.fuzz.oracle import apart, check_words, expect, forgive, scratch

READERS = (
    *("racdeploy.models.tokenizer_files", "racdeploy.models.bpe", "racdeploy.models.renumbering"),
    *("racdeploy.exporting.gguf.tokens", "racdeploy.exporting.gguf.pretokenizers"),
    *("racdeploy.sandbox.text_operations", "racdeploy.sandbox.tokenizer"),
)
_STEPS = (
    *("Replace", "Prepend", "Strip", "Lowercase", "NFC", "Sequence", "ByteLevel", "Metaspace"),
    *("Split", "Digits", "Punctuation", "Whitespace", "TemplateProcessing", "ByteFallback", "Fuse"),
    *("BPE", "Unigram", "WordPiece", "WordLevel", "BertNormalizer", "Precompiled", "Roberta"),
)
_WORDS = (
    *({"type": step} for step in _STEPS),
    *_STEPS,
    *({"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False},),
    *({"type": "Replace", "pattern": {"String": "a"}, "content": "bb"},),
    *("type", "pattern", "content", "id", "vocab", "merges", "unk_token", "byte_fallback", "ab"),
    *("added_tokens", "special", "normalizer", "pre_tokenizer", "decoder", "post_processor"),
    *({"id": 3, "content": "<t>", "special": True}, ["a", "b"], "a b", ["a", -1.5], "dropout"),
)
mutator = of_json(_WORDS)
_TEXT = "We have 11 eleven élèves; <|end|> 你好\n\n  Wait, </think> ▁a"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 64,
}


def target(data: bytes) -> None:
    """Load a tokenizer, use it, cut its vocabulary, and make the vocabulary of a GGUF file."""
    folder = _folder()
    (folder / "tokenizer.json").write_bytes(data)

    with reaches_limits() as over, _computing(InProcess):
        ours = _try(_use, folder)
        for read in (_cut, _export, _list_ends):
            _try(read, folder)
    if over[0]:
        forgive()

    if over[0] or hashlib.sha256(data).digest()[0] < 3:
        with apart(), _computing(Sandbox):
            theirs = _try(_use, folder)
        expect(over[0] or ours == theirs, f"{str(ours)[:200]!r} here, {str(theirs)[:200]!r} apart")


@contextlib.contextmanager
def _computing(kind: type[Sandbox]) -> Iterator[None]:
    """Let tokenizers be computed by that kind of reader."""
    tokenizer.Sandbox = kind  # type: ignore[misc]
    try:
        yield
    finally:
        tokenizer.Sandbox = Sandbox  # type: ignore[misc]


def _try(read: Callable[[Path], object], folder: Path) -> object:
    """Return what something returns, or the kind of our error."""
    try:
        return read(folder)
    except RacdeployError as error:
        check_words(error)
        return type(error)


def _use(folder: Path) -> str:
    encoder = PromptEncoder.start_loading(folder)
    try:
        encoder.check()
        ids = encoder.encode("a <|end|> b")
        text = encoder.decode([*encoder.encode_text(_TEXT), *range(40)])
        words = find_hesitation_ids(encoder, ["wait"])
        tags = find_tags(encoder)
        found = tags and (tags.open_ids, tags.close_ids, sorted(tags.space_ids))
        return repr((ids, text, encoder.tokenizer.control_tokens, found, words))
    finally:
        encoder.tokenizer.sandbox.close()


def _cut(folder: Path) -> None:
    """Leave out every token that none needs, as the structure ``vocabulary`` does."""
    files = TokenizerFiles(folder)
    pairs = BytePairs.read(files)
    needed = pairs.add_needed(find_config_ids(files) & pairs.texts.keys())
    size = min(len(needed) + 1, len(pairs.texts))
    renumber_files(files, pairs.fill_by_rank(needed, size))


def _export(folder: Path) -> None:
    read_vocabulary(Checkpoint(folder))


def _list_ends(folder: Path) -> None:
    expect(all(type(i) is int for i in Checkpoint(folder).eos_ids), "an end that is no number")


def survives(data: bytes) -> bool:
    """Return whether the product lives through an input that ended this process."""
    folder = _folder()
    (folder / "tokenizer.json").write_bytes(data)
    with apart(), _computing(Sandbox):
        _try(_use, folder)
    return True


@cache
def _folder() -> Path:
    """Write what lies beside a tokenizer.json."""
    folder = scratch() / "model"
    folder.mkdir()
    config = {"eos_token": "<|end|>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    return folder


def seeds() -> Iterator[bytes]:
    """Yield small tokenizers of every model, with the steps that those of real models have."""
    letters = {text: i for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "b"), ("ab", "b"), ("Ġ", "a")]
    vocab = letters | {"".join(pair): 256 + i for i, pair in enumerate(merges)}

    plain = Tokenizer(models.BPE(vocab, merges, ignore_merges=False))
    split = pre_tokenizers.Split(Regex(_QWEN2), "isolated", invert=False)
    steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    plain.pre_tokenizer = pre_tokenizers.Sequence(steps)
    plain.decoder = decoders.ByteLevel()
    plain.normalizer = normalizers.NFC()
    yield _write(plain)
    plain.post_processor = processors.TemplateProcessing("<|end|> $A", None, [("<|end|>", 259)])
    older = json.loads(_write(plain))
    older["model"]["merges"] = [" ".join(pair) for pair in merges]
    yield json.dumps(older).encode()

    pieces = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258}
    sentences = Tokenizer(models.BPE(pieces, [("▁", "a")], byte_fallback=True, fuse_unk=True))
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    sentences.normalizer = normalizers.Sequence(parts)
    sentences.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    yield _write(sentences)

    words = {"a": 0, "[UNK]": 1}
    for model in (
        models.WordLevel(words, unk_token="[UNK]"),
        models.WordPiece(words, unk_token="[UNK]"),
        models.Unigram([("a", -1.0), ("b", -2.0)], 0),
        models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
    ):
        small = Tokenizer(model)
        small.pre_tokenizer = pre_tokenizers.Metaspace()
        yield _write(small)


def _write(made: Tokenizer) -> bytes:
    made.add_special_tokens(["<|end|>", "<think>", "</think>"])
    return json.dumps(json.loads(made.to_str()), ensure_ascii=False).encode()
