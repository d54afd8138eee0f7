"""A matrix that lies in the GGUF file as two: pruned as one, with the zeros and scales of each."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

from racdeploy import quant as quants
from racdeploy.exporting import measure_sparsity
from racdeploy.exporting.gguf import export, list_linears, measure
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import choose_quants
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.quant import IMPORTANCE_FILE, presets
from racdeploy.quant.importance import Importance
from racdeploy.recipe import Pruning
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES

WHOLE = "model.layers.0.shared_mlp.input_linear.weight"
PARTS = ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("parts")
    dense = Checkpoint(make_checkpoint(folder / "dense", "granitemoehybrid"))
    blocks = folder / "blocks"
    blocks.mkdir()
    prune_blocks(dense, TRACES, [], Pruning(sparsity=0.5), blocks)
    return Checkpoint(assemble(dense, blocks, folder / "pruned"))


def test_the_parts_are_the_rows_of_the_matrix_in_order(pruned: Checkpoint, tmp_path: Path) -> None:
    """With the scales that its inputs' importance chooses, and every zero."""
    result = export(pruned, tmp_path / "m.gguf", quant="q4_0")
    found = {t.name: t for t in gguf.GGUFReader(result.path).tensors}
    stored = [gguf.dequantize(found[name].data, found[name].tensor_type) for name in PARTS]

    weight_OI = pruned.read(WHOLE)
    known_I = Importance.read(pruned.folder / IMPORTANCE_FILE).for_weight(
        "", WHOLE, weight_OI.shape[1]
    )
    form = quants.load("q4_0")
    coded_OI = form.dequantize(form.quantize(weight_OI, known_I), weight_OI.shape[1])
    np.testing.assert_array_equal(np.concatenate(stored), coded_OI)
    assert not np.array_equal(np.concatenate(stored[::-1]), coded_OI)

    assert 0.5 <= measure_sparsity(result, pruned.shape.prunable_weights) < 0.6
    assert set(PARTS) <= list_linears(pruned.family, *measure(result.path))

    matrix = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.imatrix.gguf").tensors}
    means = load_file(pruned.folder / IMPORTANCE_FILE)[WHOLE]
    for name in PARTS:
        sum_1I, count_11 = matrix[f"{name}.in_sum2"], matrix[f"{name}.counts"]
        np.testing.assert_allclose(sum_1I[0] / count_11[0, 0], means, rtol=1e-6)


def test_a_recipe_may_give_each_part_a_format(pruned: Checkpoint, tmp_path: Path) -> None:
    """Both are known before the export, for what needs one format or zeros that stay."""
    rules = {"ffn_up": "q8_0"}
    assert choose_quants(pruned, WHOLE, presets.read("q4_0", rules)) == ("q4_0", "q8_0")

    result = export(pruned, tmp_path / "m.gguf", quant="q4_0", tensors=rules)
    assert [t.actual_quant for t in result.tensors if t.name in PARTS] == ["q4_0", "q8_0"]
