"""Every pre-tokenizer name that the exporter can derive is proven by tokens, on a vocabulary that
provokes it.

A vocabulary trained behind a pre-tokenizer has no merge across its boundaries, so a wrong name
often changes nothing. Here the merges are trained on whole probe strings: whatever a pre-tokenizer
fails to split is merged, and shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from racdeploy.exporting.gguf import export, pretokenizers
from racdeploy.exporting.gguf.pretokenizers import (
    APPROXIMATE_PRE_TOKENIZERS,
    NEAREST,
    find_pre_tokenizer,
)
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.verification.probe_strings import make_mixed_lines, read_probe_strings
from tests.support.errors import raises
from tests.support.llama_child import ask_llama
from tests.support.tiny_models import make_checkpoint

TOKENS = 2900
OWN_NAMES = {"Tekken": "tekken", "o200k": "gpt-4o"}  # in llama.cpp
TEXTS = (*read_probe_strings(), *make_mixed_lines(3_000))
# llama.cpp compiles these expressions for each text, which takes milliseconds.
FEW = (*read_probe_strings()[::4], "x\u0302", *make_mixed_lines(10_000)[:150])
ROWS = {name: (steps, ignore) for (steps, ignore), name in pretokenizers.PRE_TOKENIZERS.items()}
# The same expressions; only ignore_merges differs, which trained merges rarely show.
TWINS = {frozenset(("llama-bpe", "smaug-bpe"))}


@pytest.fixture(scope="module")
def merges() -> dict[str, Any]:
    """Return a BPE model whose merges ignore every boundary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=alphabet, show_progress=False)
    # llama.cpp makes any token that reads <|im_end|> special, even a plain one.
    tokenizer.train_from_iterator(
        [text for text in read_probe_strings() if "<|" not in text], trainer
    )
    assert tokenizer.get_vocab_size() == TOKENS
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def tokens(
    tmp_path_factory: pytest.TempPathFactory, merges: dict[str, Any]
) -> dict[str, list[list[list[int]]]]:
    """Return for each name the ids of all texts: the tokenizers library's, then llama.cpp's."""
    root = tmp_path_factory.mktemp("names")
    folder = make_checkpoint(
        root / "model", "llama", vocab_size=TOKENS, hidden_size=32, num_hidden_layers=1
    )
    edit = folder / "tokenizer.json"
    files, expected = [], []
    for name in ROWS:
        edit.write_text(json.dumps(tokenizer_json(merges, name)), encoding="utf-8")
        files.append(export(Checkpoint(folder), root / f"{name}.gguf", quant="q8_0").path)
        encoded = Tokenizer.from_file(str(edit)).encode_batch(list(TEXTS), add_special_tokens=False)
        expected.append([encoding.ids for encoding in encoded])
    answers = ask_llama(files, [1, 2], TEXTS)
    return {
        name: [ids, answer.tokens]
        for name, ids, answer in zip(ROWS, expected, answers, strict=True)
    }


def tokenizer_json(merges: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a tokenizer with the pre-tokenizer that the exporter calls ``name``."""
    steps, ignore_merges = ROWS[name]
    parts = [write_step(step) for step in steps]
    pre_tokenizer = parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}
    return merges | {
        "pre_tokenizer": pre_tokenizer,
        "model": merges["model"] | {"ignore_merges": ignore_merges},
        "added_tokens": [],
    }


def write_step(step: str) -> dict[str, Any]:
    """Return the JSON of one step of the table."""
    if step == "digits":
        return {"type": "Digits", "individual_digits": True}
    if step.startswith("split "):
        pattern = {"Regex": step.removeprefix("split ")}
        return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": "regex" in step,
    }


@pytest.mark.parametrize("name", ROWS)
def test_the_derived_name_splits_alike(tokens: dict[str, list[list[list[int]]]], name: str) -> None:
    """llama.cpp, told the derived name, gives the ids of the tokenizers library for every text.

    The texts are the probe strings and 3 000 lines of mixed text.
    """
    expected, found = tokens[name]
    assert [t for t, a, b in zip(TEXTS, expected, found, strict=True) if a != b] == []


@pytest.mark.parametrize("name", ROWS)
def test_every_other_name_is_noticed(tokens: dict[str, list[list[list[int]]]], name: str) -> None:
    """The probe strings tell the name from all others, so equal tokens prove it."""
    probes = len(read_probe_strings())
    expected = tokens[name][0][:probes]
    others = [other for other in ROWS if other != name and frozenset((name, other)) not in TWINS]
    assert [other for other in others if tokens[other][1][:probes] == expected] == []


def test_equivalent_spellings_are_found(merges: dict[str, Any]) -> None:
    """Keeping the matches and removing the gaps is the same split."""
    written = tokenizer_json(merges, "qwen2")
    split = written["pre_tokenizer"]["pretokenizers"][0]
    split |= {"behavior": "Removed", "invert": True}
    assert find_pre_tokenizer([split, *written["pre_tokenizer"]["pretokenizers"][1:]]) == "qwen2"


def test_unknown_expressions_are_refused_and_can_be_overridden(tmp_path: Path) -> None:
    """A regular expression that is not in the table needs a name from the user, who is told where
    it goes.
    """
    folder = make_checkpoint(tmp_path / "model", "llama")
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("{L}+", "{L}{1,9}"), encoding="utf-8")
    with raises("unknown-pre-tokenizer", "export.pre_tokenizer"):
        export(Checkpoint(folder), tmp_path / "m.gguf", quant="f16")
    assert export(
        Checkpoint(folder), tmp_path / "m.gguf", quant="f16", pre_tokenizer="qwen2"
    ).path.is_file()


def _write(folder: Path, regex: str, model: dict[str, Any]) -> Checkpoint:
    """Give a checkpoint a tokenizer with an expression and a trained model."""
    steps = [write_step(f"split {regex}"), write_step("bytes")]
    pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    written = model | {"pre_tokenizer": pre_tokenizer, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    return Checkpoint(folder)


def _train_behind(regex: str) -> dict[str, Any]:
    """Return a BPE model as its authors train one: no merge crosses what the expression splits."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=alphabet, show_progress=False)
    lines = [text for text in TEXTS[: len(TEXTS) // 2] if "<|" not in text]
    tokenizer.train_from_iterator(lines, trainer)
    return json.loads(tokenizer.to_str())


def _find_differing(root: Path, known: str, model: dict[str, Any]) -> dict[str, Any]:
    """Return the texts that differ, by llama.cpp's own name and by the nearest."""
    folder = make_checkpoint(
        root / "model", "llama", vocab_size=TOKENS, hidden_size=32, num_hidden_layers=1
    )
    regex = next(regex for regex, each in APPROXIMATE_PRE_TOKENIZERS.items() if each == known)
    checkpoint = _write(folder, regex, model)
    names = (OWN_NAMES[known], NEAREST)
    files = [
        export(checkpoint, root / f"{name}.gguf", quant="q8_0", pre_tokenizer=name).path
        for name in names
    ]

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = tokenizer.encode_batch(list(FEW), add_special_tokens=False)
    found = {}
    for name, answer in zip(names, ask_llama(files, [1, 2], FEW), strict=True):
        rows = zip(FEW, expected, answer.tokens, strict=True)
        found[name] = [text for text, encoding, ids in rows if encoding.ids != ids]
    return found


@pytest.mark.parametrize(("regex", "known"), APPROXIMATE_PRE_TOKENIZERS.items())
def test_an_approximation_is_refused_unless_it_is_accepted(
    tmp_path: Path, merges: dict[str, Any], regex: str, known: str
) -> None:
    """The error says what to set; then the nearest name is written."""
    folder = make_checkpoint(
        tmp_path / "model", "llama", vocab_size=TOKENS, hidden_size=32, num_hidden_layers=1
    )
    checkpoint = _write(folder, regex, merges)
    with raises("approximate-pre-tokenizer", known, "export.accept_token_differences"):
        export(checkpoint, tmp_path / "m.gguf", quant="q8_0")

    accepting = {"quant": "q8_0", "accept_token_differences": 0.01}
    file = export(checkpoint, tmp_path / "m.gguf", **accepting).path
    fields = GGUFReader(file).fields
    assert fields["tokenizer.ggml.pre"].contents() == NEAREST


@pytest.mark.parametrize("known", APPROXIMATE_PRE_TOKENIZERS.values())
def test_no_name_of_llama_cpp_is_equal_to_an_approximated_expression(
    tmp_path: Path, merges: dict[str, Any], known: str
) -> None:
    """The refusal is right: with merges that provoke it, both names give other tokens."""
    found = _find_differing(tmp_path, known, merges)
    assert "x\u0302" in found[OWN_NAMES[known]]
    assert "x\u0302" not in found[NEAREST]
    assert found[NEAREST]


@pytest.mark.parametrize("known", APPROXIMATE_PRE_TOKENIZERS.values())
def test_the_nearest_name_leaves_almost_nothing_different(tmp_path: Path, known: str) -> None:
    """With merges that were trained behind the expression, as those of published models are."""
    regex = next(regex for regex, each in APPROXIMATE_PRE_TOKENIZERS.items() if each == known)
    found = _find_differing(tmp_path, known, _train_behind(regex))
    assert len(found[OWN_NAMES[known]]) > 0.1 * len(FEW)
    assert len(found[NEAREST]) <= 0.02 * len(FEW)
