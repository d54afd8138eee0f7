"""What is known of an ONNX graph before another program writes it: what it stores, and memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.packers.bitmask_graph import FOLDED_BYTES
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.tune.graphs import plan_graph
from racdeploy.tune.sizes import Size, Sizes
from tests.support.tiny_models import make_checkpoint


def predict(folder: Path, scratch: Path, **parts: dict[str, Any]) -> Size:
    """Return the size of a graph with half of the weights zeros, with or without a packing."""
    parts.setdefault("export", {"quant": "matmulnbits_8"})
    options = {"model": str(folder), "target": "onnx", "structure": {"keep": {}}, **parts}
    return Sizes(scratch).predict(Job(Recipe.combine(None, options)))


def test_a_head_that_is_the_embedding_is_counted_once(tmp_path: Path) -> None:
    """Also where the checkpoint stores it twice, which exporters do not."""
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    once = predict(folder, tmp_path)

    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file, {"format": "pt"})
    twice = predict(folder, tmp_path)

    assert "lm_head.weight" in Checkpoint(folder).entries
    assert twice.size_bytes == once.size_bytes
    assert twice.work == once.work

    untied = Checkpoint(make_checkpoint(tmp_path / "untied", "qwen3", tied=False))
    assert "lm_head.weight" in {tensor.name for tensor in plan_graph(untied, "f32")}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_only_what_is_packed_is_unpacked_in_memory(family: str, tmp_path: Path) -> None:
    """No embedding and no dense linear, and all experts, whichever a token goes through."""
    folder = make_checkpoint(tmp_path / "model", family)
    prune = {"sparsity": 0.5, "dense": [r"mlp\.gate$", "o_proj"]}
    export = {"quant": "matmulnbits_8", "packing": "bitmask_graph"}
    packed = predict(folder, tmp_path, prune=prune, export=export)
    plain = predict(folder, tmp_path, prune=prune)

    checkpoint = Checkpoint(folder)
    count = 0
    for name in checkpoint.linear_weights:
        if "o_proj" not in name and not name.endswith("mlp.gate.weight"):
            count += math.prod(checkpoint.entries[name].shape)
    unpacked = packed.work.passing_bytes - plain.work.passing_bytes
    assert unpacked == FOLDED_BYTES * count

    # Spoiled: so few zeros do not pay for a mask, and nothing is packed.
    few = predict(folder, tmp_path, prune={"sparsity": 0.1}, export=export)
    assert few.work.passing_bytes == plain.work.passing_bytes
    assert few.size_bytes == few.plain_bytes == packed.plain_bytes != packed.size_bytes
