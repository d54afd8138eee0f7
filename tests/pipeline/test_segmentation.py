"""Tokens of the same texts in a vocabulary and in a smaller one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.renumbering import read_old_ids
from racdeploy.pipeline.tokenization import compare_tokenization
from racdeploy.pruning.structures import vocabulary
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verification.probe_strings import make_mixed_lines
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

KEPT = "Ann has 12 apples and buys 30 more."


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same one with the tokens of one sentence and the least of others."""
    dense = make_checkpoint(tmp_path / "dense", "qwen2")
    used = PromptEncoder.from_folder(dense).encode_text(KEPT)
    checkpoint = Checkpoint(dense)
    old_ids = vocabulary.choose(checkpoint, 290, used)
    return dense, vocabulary.rewrite(checkpoint, old_ids, tmp_path / "cut")


def test_tokens_are_counted_in_both(folders: tuple[Path, Path]) -> None:
    """Kept text is the same; other text takes more tokens, by the count of both tokenizers."""
    dense, cut = map(PromptEncoder.from_folder, folders)
    old_ids = read_old_ids(folders[1])
    kept = compare_tokenization(dense, cut, old_ids, [KEPT])
    count = len(dense.encode_text(KEPT))
    assert (count, count, count) == (kept.before, kept.after, kept.same)

    other = compare_tokenization(dense, cut, old_ids, [KEPT, "the lazy dog"])
    added = [len(encoder.encode_text("the lazy dog")) for encoder in (dense, cut)]
    assert [count + more for more in added] == [other.before, other.after]
    assert 0 < other.same < other.before
    assert f"it takes {other.after / other.before:.4f} times as many" in other.describe("it takes")


def test_a_text_that_does_not_come_back_stops_the_build(folders: tuple[Path, Path]) -> None:
    """A tokenizer whose tokens were mixed up is noticed on the first text."""
    file = folders[1] / "tokenizer.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    vocab = written["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(written), encoding="utf-8")

    dense, cut = map(PromptEncoder.from_folder, folders)
    texts = make_mixed_lines(20)
    same = compare_tokenization(dense, cut, read_old_ids(folders[1]), texts)
    assert same.same < same.before, "ids are others; the texts still come back"

    written["model"]["vocab"] = {**vocab, "a": vocab["b"], "b": vocab["a"]}
    written["decoder"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "x"}
    file.write_text(json.dumps(written), encoding="utf-8")
    with raises("text-not-restored"):
        compare_tokenization(
            dense, PromptEncoder.from_folder(folders[1]), np.arange(290), [KEPT, *texts]
        )
