"""A build that cuts the vocabulary, and what is done to its bundle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import racdeploy as package
from racdeploy.manifest import Manifest
from tests.support.commands import racdeploy

KEPT = 400
_KINDS = ("unclosed", "loops", "forced", "truncated")
ASKED = (
    *("--tasks", "gcd", "--trace-prompts", 32, "--set", f"structure.keep={{vocabulary={KEPT}}}"),
    *("--set", 'export.rounding="nearest"'),  # as prune alone leaves it
)

WIDE_LIMITS = [
    part
    for name in ("accuracy.margin", *(f"thinking.{kind}" for kind in _KINDS))
    for part in ("--set", f"gate.{name}=0.2")
]
"""What 20 prompts without a difference can show."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the embedded model, with a work folder beside it."""
    folder = tmp_path_factory.mktemp("vocabulary")
    outcome = racdeploy(
        *("build", "--target", "ci-smoke", *ASKED, "--prompts", 20, *WIDE_LIMITS),
        *("--work", folder / "work", "--out", folder / "bundle"),
    )
    assert outcome.code == 0, outcome.out + outcome.err
    assert "PASS" in outcome.out
    return folder / "bundle"


def test_the_artifact_has_fewer_tokens_and_answers_alike(bundle: Path) -> None:
    """The report says what was cut; the file, its tokenizer and its ends agree."""
    manifest = Manifest.read(bundle)
    assert Tokenizer.from_file(str(bundle / "tokenizer.json")).get_vocab_size() == KEPT
    assert manifest.tokenizer.eos_ids == (KEPT - 3,)
    assert manifest.dense_tokenizer is not None
    assert manifest.dense_tokenizer.eos_ids == (509,)

    old_ids = json.loads((bundle / "vocabulary_ids.json").read_text())["old_ids"]
    assert len(old_ids) == KEPT
    assert "vocabulary_ids.json" in manifest.tokenizer.files

    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    shapes = {row["name"]: row["size_bytes"] for row in report["tensors"]}
    assert shapes["token_embd.weight"] == KEPT * 256 // 32 * 34
    checks = {check["name"]: check["verdict"] for check in report["checks"]}
    assert checks["tokens"] == checks["template"] == checks["logits"] == "pass"

    notes = "\n".join(report["notes"])
    assert f"vocabulary: 512 → {KEPT} tokens" in notes
    assert "keep 100.00% of" in notes
    assert re.search(r"take \d+\.\d+ times as many tokens in the cut vocabulary", notes)
    assert "of its probability to tokens that are gone" in notes


def test_prune_alone_prints_the_folder_with_fewer_tokens(bundle: Path) -> None:
    """The same stages are found again, and transformers opens what is printed."""
    outcome = racdeploy(
        *("prune", "--target", "ci-smoke", *ASKED, "--set", "verify.count=20"),
        *("--work", bundle.parent / "work"),
    )
    assert outcome.code == 0, outcome.err
    folder = Path(outcome.out.strip().splitlines()[0])
    assert folder.parent.name.startswith("vocabulary-")
    assert len(list(folder.parent.parent.glob("vocabulary-*"))) == 1

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape == (KEPT, 256)
    assert model.config.eos_token_id == KEPT - 3


def test_both_arms_write_their_prompts_themselves(bundle: Path) -> None:
    """The same question has other ids in the records of each."""
    lines = (bundle / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    first = {r["arm"]: r["prompt_ids"] for r in records if r["prompt"] == 0}
    old_ids = json.loads((bundle / "vocabulary_ids.json").read_text())["old_ids"]
    assert first["dense"] != first["pruned"]
    assert first["dense"] == [old_ids[i] for i in first["pruned"]]


def test_the_bundle_is_verified_again(bundle: Path, tmp_path: Path) -> None:
    """Against its own answers, and against the dense artifact, which has more tokens."""
    own = racdeploy("verify", bundle, "--work", tmp_path / "work", "--json")
    assert own.code == 0, own.out + own.err

    (dense,) = bundle.parent.glob("work/export-*/*-dense-q8_0.gguf")
    again = racdeploy("verify", bundle, "--baseline", dense, "--work", tmp_path / "work", "--json")
    assert again.code == 0, again.out + again.err
    arms = [
        {arm["name"]: arm["correct"] for arm in json.loads(each.out)["arms"]}
        for each in (own, again)
    ]
    assert arms[0] == arms[1]


def test_the_bundle_answers(bundle: Path) -> None:
    """racdeploy.load needs nothing that was cut."""
    with package.load(bundle, threads=1) as model:
        result = model.generate("What is the greatest common divisor of 12 and 30?", temperature=0)
    assert "6" in result.answer
    assert result.state == "closed"


def test_a_damaged_dense_tokenizer_is_noticed(bundle: Path, tmp_path: Path) -> None:
    """It is listed with its hash."""
    file = bundle / "dense" / "tokenizer.json"
    before = file.read_bytes()
    try:
        file.write_bytes(before + b" ")
        outcome = racdeploy("verify", bundle, "--work", tmp_path / "work")
    finally:
        file.write_bytes(before)
    assert (outcome.code, outcome.error_code) == (2, "differs-from-manifest")
    assert "dense/tokenizer.json" in outcome.err


def test_too_few_tokens_are_refused_before_any_work(tmp_path: Path) -> None:
    """The message says the least; nothing was written."""
    few = ("--set", "structure.keep={vocabulary=270}")
    outcome = racdeploy(
        "prune", "--tasks", "gcd", *few, "--work", tmp_path / "work", "--trace-prompts", 8
    )
    assert (outcome.code, outcome.error_code) == (2, "vocabulary-too-small")
    assert re.search(r"--keep vocabulary=\d+ ", outcome.err)
    assert not (tmp_path / "work").exists()


def test_a_users_text_needs_a_cut_vocabulary(tmp_path: Path) -> None:
    """Without one the file would not be read; that is said, not ignored."""
    text = tmp_path / "notes.txt"
    text.write_text("any")
    outcome = racdeploy("prune", "--vocabulary-text", text, "--work", tmp_path / "work")
    assert (outcome.code, outcome.error_code) == (2, "invalid-settings")
    assert "vocabulary_text" in outcome.err
