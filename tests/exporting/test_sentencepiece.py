"""Tokenizers in SentencePiece's form: llama.cpp gives the ids of the tokenizers library, or the
export is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

from racdeploy.exporting.gguf import export
from racdeploy.exporting.gguf.piece_scores import score_by_rank
from racdeploy.exporting.gguf.sentencepiece import check_merges
from racdeploy.models.bpe import BYTE_PIECES
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.verification.probe_strings import make_mixed_lines, read_probe_strings
from tests.support.errors import raises
from tests.support.llama_child import ask_llama
from tests.support.tiny_models import (
    SPECIAL_TOKENS,
    TRAINED_TOKENS,
    edit_json,
    make_checkpoint,
)
from tests.support.tiny_pieces import pieces_json, train_pieces

FORMS = [(form, model) for form in ("mistral", "gemma") for model in (True, False)]
TEXTS = (*read_probe_strings(), *make_mixed_lines(10_000))


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], list[str]]:
    """Return the texts that llama.cpp tokenizes otherwise, by form and by whether there is a
    tokenizer.model.
    """
    root = tmp_path_factory.mktemp("pieces")
    folders = [
        make_checkpoint(
            root / f"{form} {model}", "llama", pre_tokenizer=form, tokenizer_model=model
        )
        for form, model in FORMS
    ]
    files = [
        export(Checkpoint(folder), folder.with_suffix(".gguf"), quant="q8_0").path
        for folder in folders
    ]
    found = {}
    for form, folder, answer in zip(FORMS, folders, ask_llama(files, [1, 2], TEXTS), strict=True):
        encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(
            list(TEXTS), add_special_tokens=False
        )
        rows = zip(TEXTS, encoded, answer.tokens, strict=True)
        found[form] = [text for text, encoding, ids in rows if encoding.ids != ids]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint with a tokenizer like Mistral 7B's, and its tokenizer.model."""
    return make_checkpoint(
        tmp_path / "model", "llama", pre_tokenizer="mistral", tokenizer_model=True
    )


@pytest.mark.parametrize(("form", "model"), FORMS)
def test_every_text_gets_the_same_ids(
    differences: dict[tuple[str, bool], list[str]], form: str, model: bool
) -> None:
    """The probe strings and 10 000 lines of mixed text, with the scores of tokenizer.model and
    without them.
    """
    assert differences[form, model] == []


def _never(**changes: Any) -> dict[str, Any]:
    """Return a Metaspace that puts no space first."""
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    return {"normalizer": None, "pre_tokenizer": step | changes}


def _write_gemma(folder: Path, texts: tuple[str, ...], change: Any) -> Path:
    """Give a checkpoint a tokenizer like Gemma's, trained on texts and then changed."""
    make_checkpoint(folder, "llama", pre_tokenizer="gemma")
    file = folder / "tokenizer.json"
    special = [
        token
        for token in json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        if token["content"] in SPECIAL_TOKENS
    ]
    own = ("<b>",)
    written = pieces_json(train_pieces(texts, TRAINED_TOKENS, own), own, space_first=False)
    written["added_tokens"] += special
    change(written)
    file.write_text(json.dumps(written), encoding="utf-8")
    return folder


def _shuffle(tokenizer: dict[str, Any]) -> None:
    Random(0).shuffle(tokenizer["model"]["merges"])


_RAW = tuple(text.replace("\n", " ") for text in read_probe_strings() if text.isascii()) * 3
_SPACED = tuple(" ".join(text.split()) for text in _RAW)


@pytest.mark.parametrize(
    ("texts", "change", "form"),
    [
        (_RAW, _shuffle, "gemma4"),
        (_RAW, lambda t: t.update(_never()), "llama"),
        (_SPACED, lambda t: t.update(_never(split=True)), "llama"),
    ],
    ids=["merges in any order", "Metaspace", "Metaspace that splits"],
)
def test_forms_without_a_space_first_are_equal(
    tmp_path: Path, texts: tuple[str, ...], change: Any, form: str
) -> None:
    """Merges that scores cannot say are written as Gemma 4's; a Metaspace replaces spaces alone."""
    folder = _write_gemma(tmp_path / "model", texts, change)
    file = export(Checkpoint(folder), tmp_path / "m.gguf", quant="q8_0").path
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.model"].contents() == form

    asked = [*TEXTS[:2000], "\n\n\n", "a\n\n\n\nb", "\n" * 40, " a", "a  b   c", " <b> x"]
    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(
        asked, add_special_tokens=False
    )
    found = ask_llama([file], [1, 2], asked)[0].tokens
    assert [t for t, a, b in zip(asked, encoded, found, strict=True) if a.ids != b] == []


@pytest.mark.parametrize("piece", ["a\n", "a b", "\n\n"])
def test_merges_that_llama_would_not_follow_are_refused(piece: str) -> None:
    """It splits between lines, and looks a run of line ends up before it joins."""
    vocab = {text: i for i, text in enumerate([*sorted(BYTE_PIECES), "a", "\n"])}
    check_merges(vocab, set(), lambda text: [vocab[text]])

    vocab[piece] = len(vocab)
    with raises("unsupported-tokenizer", repr(piece)):
        check_merges(vocab, set(), lambda text: [vocab["\n"]] * len(text))
    check_merges(vocab, {piece}, lambda text: [vocab["\n"]])


def test_a_metaspace_that_splits_inside_a_piece_is_refused(tmp_path: Path) -> None:
    """llama.cpp would join over the space."""
    spaces = tuple("x  " * 9 for _ in range(20))
    folder = _write_gemma(
        tmp_path / "model", (*_RAW, *spaces), lambda t: t.update(_never(split=True))
    )
    with raises("unsupported-tokenizer", "Metaspace", "'never'"):
        export(Checkpoint(folder), tmp_path / "m.gguf", quant="q8_0")


def test_types_and_special_ids_are_written(folder: Path, tmp_path: Path) -> None:
    """Bytes, control tokens and the user's own have their types; the space in front is a
    setting.
    """
    reader = gguf.GGUFReader(export(Checkpoint(folder), tmp_path / "m.gguf", quant="q8_0").path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    kinds = {
        text: types[tokens.index(text)]
        for text in ("<s>", "<b>", "<0x0A>", "▁", "<|im_end|>", "[PAD511]")
    }
    assert kinds == {"<s>": 3, "<b>": 4, "<0x0A>": 6, "▁": 1, "<|im_end|>": 3, "[PAD511]": 5}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.eos_token_id"] == SPECIAL_TOKENS["<|im_end|>"]


def _without_a_merge(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].pop(3)


def _reversed(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].reverse()


def _renamed(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    left, right = (piece for piece in list(vocab)[-2:])
    vocab[left], vocab[right] = vocab[right], vocab[left]


def _without_a_byte(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab["<0xGG>"] = vocab.pop("<0xFF>")


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        (_without_a_merge, "missing-merge", []),
        (_reversed, "merges-against-scores", []),
        (_renamed, "tokenizers-differ", ["tokenizer.model"]),
        (_without_a_byte, "unsupported-tokenizer", ["'<0xFF>'"]),
        (
            lambda t: t["model"].update(ignore_merges=True),
            "unsupported-tokenizer",
            ["ignore_merges"],
        ),
        (lambda t: t["model"].update(type="Unigram"), "unsupported-tokenizer", ["--target onnx"]),
        (lambda t: t.update(normalizer={"type": "NFKC"}), "unsupported-tokenizer", ["NFKC"]),
        (
            lambda t: t.update(
                normalizer=None,
                pre_tokenizer={
                    "type": "Metaspace",
                    "replacement": "▁",
                    "prepend_scheme": "first",
                    "split": False,
                },
            ),
            "unsupported-tokenizer",
            ["Metaspace", "'first'"],
        ),
        (
            lambda t: t["added_tokens"][-1].update(normalized=True),
            "unsupported-tokenizer",
            ['"normalized": false'],
        ),
        (
            lambda t: t["added_tokens"][-1].update(content="<▁>", special=False),
            "unsupported-tokenizer",
            ["'<▁>'"],
        ),
    ],
)
def test_what_llama_would_read_differently_is_refused(
    folder: Path, tmp_path: Path, change: Any, code: str, values: list[str]
) -> None:
    """A tokenizer that scores cannot express is an error in a sentence."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    change(tokenizer)
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    with raises(code, *values):
        export(Checkpoint(folder), tmp_path / "m.gguf", quant="q8_0")


def test_a_damaged_tokenizer_model_is_named(folder: Path, tmp_path: Path) -> None:
    """The C++ library's complaint becomes an error with the file's name."""
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\xff")
    with raises("damaged-sentencepiece", "tokenizer.model"):
        export(Checkpoint(folder), tmp_path / "m.gguf", quant="q8_0")


def test_a_name_with_phi3_needs_its_tokens(folder: Path, tmp_path: Path) -> None:
    """llama.cpp strips spaces after special tokens by the model's name, and fails where it misses
    one of them.
    """
    (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json")
        .read_text(encoding="utf-8")
        .replace("<|endoftext|>", "<|over|>"),
        encoding="utf-8",
    )
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    with raises("misleading-model-name", "'My-Phi-3'"):
        export(
            Checkpoint(folder),
            tmp_path / "m.gguf",
            quant="q8_0",
            metadata={"general.name": "My-Phi-3"},
        )


def test_interleaved_runs_get_one_score() -> None:
    """Runs of one character whose merges interleave had equal scores; other pieces are ranked one
    by one.
    """
    assert score_by_rank(["ab", "   ", "    ", "   ", "cd", "ef"]) == {
        "ab": 0.0, "   ": -1.0, "    ": -1.0, "cd": -4.0, "ef": -5.0,
    }  # fmt: skip
