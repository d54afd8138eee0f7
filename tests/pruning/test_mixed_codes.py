"""Codes chosen while pruning, of a number format for each linear: the file holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np

from racdeploy.exporting import gguf
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.recipe import Pruning, Recipe
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES

TENSORS = {r"^blk\.1\.ffn_down": "q8_0", "attn_(q|k)": "q5_0"}


def _job(folder: Path, **more: Any) -> Job:
    export = {"quant": "q4_0", "tensors": TENSORS, **more.pop("export", {})}
    asked = {"model": str(folder), "export": {"rounding": "optimized", **export}}
    settings = {"sparsity": 0.0, **more.pop("prune", {})}
    return Job(Recipe.combine(None, {**asked, "prune": settings, **more}))


def test_a_file_of_several_formats_holds_the_very_weights(tmp_path: Path) -> None:
    """Each linear in its own; under the formats of others they are no codes."""
    dense = Checkpoint(make_checkpoint(tmp_path / "dense", "llama"))
    quants = _job(dense.folder).rounding_quants
    assert quants["model.layers.1.mlp.down_proj"] == "q8_0"
    assert quants["model.layers.0.self_attn.k_proj"] == "q5_0"
    assert quants["model.layers.0.mlp.down_proj"] == "q4_0"

    blocks = tmp_path / "blocks"
    blocks.mkdir()
    prune_blocks(dense, TRACES, [], Pruning(sparsity=0.0), blocks, quant=quants)
    pruned = Checkpoint(assemble(dense, blocks, tmp_path / "pruned"))

    found = {}
    for name, quant, tensors in (
        ("plain", "f32", {}),
        ("coded", "q4_0", TENSORS),
        ("other", "q4_0", {}),
    ):
        file = tmp_path / f"{name}.gguf"
        gguf.export(pruned, file, quant=quant, tensors=tensors)
        linears = gguf.list_linears(pruned.family, *gguf.measure(file))
        found[name] = {
            tensor.name: gguf_py.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf_py.GGUFReader(file).tensors
            if tensor.name in linears
        }

    plain = found["plain"]
    assert len(plain) == 14
    assert all(np.array_equal(plain[name], found["coded"][name]) for name in plain)
    lost = {name for name in plain if not np.array_equal(plain[name], found["other"][name])}
    assert lost == {f"blk.{n}.attn_{x}.weight" for n in (0, 1) for x in "qk"} | {
        "blk.1.ffn_down.weight"
    }


def test_each_linear_that_is_not_kept_dense_has_a_format(tmp_path: Path) -> None:
    """A format without a grid is refused."""
    folder = make_checkpoint(tmp_path / "dense", "llama")
    ignored = ["self_attn.[qk]_proj$", r"1\.mlp.down_proj$"]
    assert {*_job(folder, prune={"ignore": ignored}).rounding_quants.values()} == {"q4_0"}
    with raises("no-optimized-rounding", "as f16"):
        _ = _job(folder, export={"quant": "f16", "tensors": {}}).rounding_quants


def test_blocks_that_go_need_one_format(tmp_path: Path) -> None:
    """Patterns are of the file, which numbers blocks otherwise."""
    folder = make_checkpoint(tmp_path / "dense", "llama")
    with raises("codes-need-all-blocks"):
        _ = _job(folder, structure={"keep": {"blocks": 0.5}}).rounding_quants
