"""A model cut in every part, as ONNX and as GGUF, from one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import racdeploy as package
from racdeploy.exporting.onnx import measure
from racdeploy.manifest import Manifest
from tests.support.commands import racdeploy

pytestmark = pytest.mark.slow
KEPT = ("ffn=0.75", "heads=0.75", "blocks=0.75", "vocabulary=400")
ASKED = ("--tasks", "gcd", "--trace-prompts", 32, "--prompts", 8, "--sparsity", 0.5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, cut on so few traces that it answers what it will."""
    folder = tmp_path_factory.mktemp("cut")
    parts = [word for part in KEPT for word in ("--keep", part)]
    outcome = racdeploy(
        *("build", "tiny-reasoner", "--target", "onnx", "--more-targets", "gguf", *ASKED, *parts),
        *("--work", folder / "work", "--out", folder / "bundle", "--threads", 1),
    )
    assert outcome.code in (1, 3), outcome.err
    return folder / "bundle"


def test_every_file_says_the_same_of_each_block(bundle: Path) -> None:
    """The graph's tensors, config.json, genai_config.json and the manifest."""
    manifest = Manifest.read(bundle)
    onnx, _ = manifest.artifacts
    shapes = {row.name: row.shape for row in measure(bundle / onnx.path)[1]}
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    widths = config["racdeploy_block_widths"]
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{block}"
        channels, hidden = shapes[f"{prefix}.mlp.up_proj.weight"]
        query, _ = shapes[f"{prefix}.self_attn.q_proj.weight"]
        assert (channels, hidden) == (widths["intermediate_size"][block], config["hidden_size"])
        assert query == widths["num_attention_heads"][block] * config["head_dim"]
    assert len(set(widths["intermediate_size"])) > 1
    assert f"model.layers.{config['num_hidden_layers']}.mlp.up_proj.weight" not in shapes
    assert shapes["model.embed_tokens.weight"][0] == config["vocab_size"] == 400
    genai = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))["model"]
    assert (genai["vocab_size"], genai["eos_token_id"]) == (400, list(manifest.tokenizer.eos_ids))
    assert genai["decoder"]["num_hidden_layers"] == config["num_hidden_layers"] == 3


def test_both_engines_compute_the_cut_model(bundle: Path) -> None:
    """Close to torch by the report's check, which holds the first; the second agrees with it."""
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    checks = {check["name"]: check["verdict"] for check in report["checks"]}
    assert {checks[name] for name in ("integrity", "logits", "sparsity", "template")} == {"pass"}
    for backend in ("onnxruntime", "llamacpp"):
        with package.load(bundle, backend=backend, threads=1) as model:
            assert model.generate("What is 12 times 34?", temperature=0).thinking_tokens


def test_inspect_shows_the_widths(bundle: Path) -> None:
    outcome = racdeploy("inspect", bundle / Manifest.read(bundle).artifacts[0].path)
    assert outcome.code == 0, outcome.err
    widths = json.loads((bundle / "config.json").read_text())["racdeploy_block_widths"]
    for value in widths["intermediate_size"]:
        assert str(value) in outcome.out
