"""Codes chosen while pruning are those of the file, whatever llama.cpp does to rows and columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
from numpy.typing import NDArray

from racdeploy.exporting import gguf
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.conversion import find_value_head_order
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.pruning.weights import solving
from racdeploy.recipe import Pruning
from tests.support.tiny_models import FAMILIES, GRANITE_EXPERTS, NEMOTRON_EXPERTS, make_checkpoint
from tests.support.tiny_traces import TRACES

# Rows turn, rows are split or laid behind each other, columns go by value heads of 16.
CASES: dict[str, dict[str, Any]] = {
    "qwen35": {"family": "qwen3_5_text"},
    "qwen35 of a head for each": {"family": "qwen3_5_text", "linear_num_key_heads": 4},
    "granite 4": {"family": "granitemoehybrid"},
    "granite 4 experts": {"family": "granitemoehybrid", **GRANITE_EXPERTS},
    "nemotron h": {"family": "nemotron_h", "head_dim": 32},
    "nemotron h experts": {"family": "nemotron_h", "head_dim": 32, **NEMOTRON_EXPERTS},
    "lfm2 experts": {"family": "lfm2_moe"},
    "falcon h1": {"family": "falcon_h1", "head_dim": 32},
}
CASES = {name: case for name, case in CASES.items() if case["family"] in FAMILIES}
pytestmark = pytest.mark.skipif(not CASES, reason="transformers lacks all of these families")


def _prune(folder: Path, case: dict[str, Any], quant: str) -> Checkpoint:
    dense = Checkpoint(make_checkpoint(folder / "dense", **case))
    blocks = folder / "blocks"
    blocks.mkdir()
    prune_blocks(dense, TRACES, [], Pruning(sparsity=0.5), blocks, quant=quant)
    return Checkpoint(assemble(dense, blocks, folder / "pruned"))


def _read(pruned: Checkpoint, file: Path, quant: str) -> dict[str, NDArray[np.float32]]:
    """Return the linears of a file of the pruned model, in float32."""
    gguf.export(pruned, file, quant=quant)
    linears = gguf.list_linears(pruned.family, *gguf.measure(file))
    return {
        tensor.name: gguf_py.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf_py.GGUFReader(file).tensors
        if tensor.name in linears
    }


def _list_changed(pruned: Checkpoint, folder: Path, quant: str) -> set[str]:
    """Return the linears of which the file has other weights than the pruned model."""
    plain = _read(pruned, folder / "plain.gguf", "f32")
    coded = _read(pruned, folder / "coded.gguf", quant)
    assert plain.keys() == coded.keys()
    # Weights whose rows have a factor in the file were divided by it, which rounds.
    rtol = 1e-6 if pruned.family.scaling.rows else 0
    return {n for n in plain if not np.allclose(plain[n], coded[n], rtol=rtol, atol=0)}


@pytest.mark.parametrize("case", CASES)
def test_a_file_holds_the_very_weights(case: str, tmp_path: Path) -> None:
    """In F32, which says what llama.cpp's order is, and in codes."""
    pruned = _prune(tmp_path, CASES[case], "q4_0")
    assert _list_changed(pruned, tmp_path, "q4_0") == set()


@pytest.mark.skipif("qwen3_5_text" not in FAMILIES, reason="transformers 4 has no Qwen3.5")
def test_codes_of_other_neighbours_would_not_be_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the columns of two heads share a step in the file, the checkpoint's order is wrong."""
    monkeypatch.setattr(solving, "find_gguf_layout", lambda *_: solving.GgufLayout())
    pruned = _prune(tmp_path, CASES["qwen35"], "q4_0")
    assert find_value_head_order(pruned.shape, 64) is not None
    changed = _list_changed(pruned, tmp_path, "q4_0")
    assert {name.split(".", 2)[2] for name in changed} == {"ssm_out.weight"}
