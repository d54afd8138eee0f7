"""The examples of the Python reference run, one after the other, and make what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import racdeploy
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

REFERENCE = (Path(__file__).parents[2] / "docs/reference/api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", REFERENCE, re.MULTILINE | re.DOTALL)
RECIPE = """
tasks = ["jsonl:problems.jsonl"]
[traces]
count = 40
max_new_tokens = 24
[calibration]
keep_truncated = true
[prune]
method = "magnitude"
[verify]
count = 24
max_new_tokens = 24
context_tokens = 128
logit_traces = 2
"""
TUNE = """
tasks = ["comparison"]
[prune]
method = "magnitude"
[export]
rounding = "nearest"
[traces]
count = 40
max_new_tokens = 128
[calibration]
held_out_share = 0.5
[verify]
count = 16
max_new_tokens = 128
context_tokens = 512
logit_traces = 2
[tune]
quants = ["q8_0"]
ffn = []
zeros = [0.5]
prompts = 16
budget_s = 600
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model, a recipe that asks little of it, and questions."""
    folder = tmp_path_factory.mktemp("api")
    make_checkpoint(folder / "my-model", "llama", intermediate_size=128)
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    (folder / "tune.toml").write_text(TUNE, encoding="utf-8")
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(90)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """What the examples of the reference leave, one after the other, as a reader runs them."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for example in EXAMPLES:
            exec(compile(example, "docs/reference/api.md", "exec"), found)
    return found


def test_the_examples_make_what_they_say(names: dict[str, Any], folder: Path) -> None:
    """Each record has its figures, and prints them."""
    bundle, pruned = names["bundle"], names["pruned"]
    assert isinstance(bundle, racdeploy.Bundle)
    assert bundle.exit_code == {"pass": 0, "fail": 1, "inconclusive": 3}[bundle.verdict]
    assert bundle.size_bytes == bundle.report.find_arm("pruned").size_bytes
    assert f"size_bytes={bundle.size_bytes}" in repr(bundle)
    assert (folder / bundle.folder / "report.json").is_file()

    assert isinstance(pruned, racdeploy.PrunedFolder)
    assert pruned.sparsity == pytest.approx(0.3, abs=0.02)
    assert names["recovered"].notes, "whether it learned, or why it was left as it was"
    assert (folder / names["exported"].path).stat().st_size == names["exported"].size_bytes
    assert isinstance(names["tuned"], racdeploy.TunedBundle)
    assert names["verdict"].accuracy == bundle.accuracy
    assert names["verdict"].records
    assert names["verdict"].name == bundle.name == bundle.report.model
    reference = bundle.report.find_arm("dense")
    assert (bundle.reference_accuracy, bundle.reference_size_bytes) == (
        reference.accuracy,
        reference.size_bytes,
    )
    assert names["contents"].summary["size_bytes"] == bundle.size_bytes
    assert set(names["speed"].medians()[0]) == set(names["speed"].ratios())


def test_a_model_in_memory_is_its_folder(
    names: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved once, by its content; without its tokenizer it is refused."""
    monkeypatch.chdir(folder)
    before = sorted((folder / "work").glob("model-*"))
    again = racdeploy.export(
        names["dense"], tokenizer=names["tokenizer"], out="again.gguf", work="work"
    )
    named = racdeploy.export("my-model", out="named.gguf")
    assert sorted((folder / "work").glob("model-*")) == before != []
    measure = racdeploy.exporting.load("gguf").measure  # type: ignore[attr-defined]
    assert measure(again.path)[1] == measure(named.path)[1], "the same tensors"

    with raises("no-tokenizer-given", "LlamaForCausalLM"):
        racdeploy.build(names["dense"], work="work")
