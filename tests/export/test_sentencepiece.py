"""Tokenizers in SentencePiece's form: llama.cpp gives the ids of the tokenizers library, or the
export is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

from racdeploy.errors import ModelError
from racdeploy.export.gguf import export
from racdeploy.export.gguf.sentencepiece import score_by_rank
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.verify.probe_strings import probe_strings
from tests.support.llama_child import ask_llama
from tests.support.mixed_text import mixed_lines
from tests.support.tiny_models import SPECIAL_TOKENS, edit_json, make_checkpoint

FORMS = [(form, model) for form in ("mistral", "gemma") for model in (True, False)]
TEXTS = (*probe_strings(), *mixed_lines(10_000))


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
    ("change", "message"),
    [
        (_without_a_merge, "no such merge"),
        (_reversed, "its scores say the reverse"),
        (_renamed, r"tokenizer\.model has the piece"),
        (_without_a_byte, "no token '<0xFF>'"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda t: t.update(normalizer={"type": "NFKC"}), "NFKC"),
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
            "Metaspace with prepend_scheme 'first'",
        ),
        (lambda t: t["added_tokens"][-1].update(normalized=True), "normalized text"),
        (
            lambda t: t["added_tokens"][-1].update(content="<▁>", special=False),
            "before it puts a space first",
        ),
    ],
)
def test_what_llama_would_read_differently_is_refused(
    folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    """A tokenizer that scores cannot express is an error in a sentence."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    change(tokenizer)
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        export(Checkpoint(folder), tmp_path / "m.gguf", quant="q8_0")


def test_a_damaged_tokenizer_model_is_named(folder: Path, tmp_path: Path) -> None:
    """The C++ library's complaint becomes an error with the file's name."""
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\xff")
    with pytest.raises(ModelError, match=r"tokenizer\.model cannot be loaded"):
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
    with pytest.raises(ModelError, match="phi-3"):
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
