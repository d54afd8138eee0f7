"""LFM2 with experts in all blocks but the first: chosen by sigmoids and a bias, and removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.exporting.gguf import export
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import list_structure_rows, read_cut_plan
from racdeploy.pruning.walk.assemble import CutShape, assemble
from racdeploy.recipe import Pruning, Structure
from tests.support.expert_costs import estimate_costs
from tests.support.llama_child import ask_llama
from tests.support.tiny_models import FAMILIES, make_checkpoint
from tests.support.tiny_traces import make_trace

pytestmark = pytest.mark.skipif("lfm2_moe" not in FAMILIES, reason="transformers 4 has none")
CALIBRATION = [make_trace(i, 5 + i % 7, 30, 4) for i in range(16)]
E = 8
IDS = torch.randint(0, 480, (1, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("experts") / "model"
    return Checkpoint(make_checkpoint(folder, "lfm2_moe", dtype="float32", num_experts=E))


def compute(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits_BTV: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits_BTV


def check_engines(model: Checkpoint, file: Path) -> None:
    """Compare torch, transformers and llama.cpp; rounding errors are near 1e-6."""
    own_BTV = compute(load_model(model))
    theirs = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    torch.testing.assert_close(own_BTV, compute(theirs), rtol=1e-5, atol=1e-5)

    (answer,) = ask_llama([export(model, file, quant="f32").path], IDS[0].tolist())
    assert np.abs(answer.logits_TV - own_BTV[0].numpy()).max() < 1e-4 * own_BTV.abs().max()


def test_experts_go_with_their_rows_of_the_router_and_of_the_bias(
    dense: Checkpoint, tmp_path: Path
) -> None:
    """In blocks that have some; every engine computes what is left, half of it zero."""
    structure = Structure(keep={"experts": 0.75}, uniform=True)
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    settings = Pruning(expert_tokens=1, sparsity=0.5)
    linears, _ = prune_blocks(dense, CALIBRATION, [], settings, blocks, structure=structure)
    shape = read_cut_plan(blocks).shape(dense.shape, structure)
    model = Checkpoint(assemble(dense, blocks, tmp_path / "model", shape))

    rows = list_structure_rows(dense.shape, shape)
    assert [(row.experts, row.experts_dense) for row in rows] == [(0, 0), (6, E), (6, E)]
    assert len(linears) == (2 + 3) + (4 + 6 * 3) + (2 + 6 * 3)
    assert {round(row.actual_sparsity, 2) for row in linears} == {0.5}

    stored = load_file(model.folder / "model.safetensors")
    for block in (1, 2):
        kept = json.loads((blocks / f"block-{block:05d}.json").read_text())["kept"]["experts"]
        prefix = f"model.layers.{block}.feed_forward"
        for name in ("gate.weight", "expert_bias"):
            np.testing.assert_array_equal(
                stored[f"{prefix}.{name}"], dense.read(f"{prefix}.{name}")[kept]
            )
    check_engines(model, tmp_path / "cut.gguf")


def test_the_cost_of_an_expert_is_that_of_its_removal(dense: Checkpoint, tmp_path: Path) -> None:
    """Against the block whose router is without it, token by token."""
    with torch.inference_mode():
        block, costs, outputs = estimate_costs(dense, CALIBRATION, tmp_path, 1)
        whole_ND, mixture = outputs(), block.feed_forward
        bias_E = mixture.expert_bias.data
        for expert in range(E):
            mixture.expert_bias.data = bias_E.clone()
            mixture.expert_bias.data[expert] = -torch.inf
            change_N = (outputs() - whole_ND).square().sum(1) / whole_ND.square().sum(1)
            assert costs[expert] == pytest.approx(float(change_N.sum()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("kept", "first_sparse"), [((1, 2), 0), ((0, 1), 1)])
def test_blocks_that_stay_have_experts_or_none_as_before(
    dense: Checkpoint, tmp_path: Path, kept: tuple[int, ...], first_sparse: int
) -> None:
    """The number of first blocks without experts is counted again."""
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    left = CutShape(kept, [dense.shape.sizes[block] for block in kept])
    model = Checkpoint(assemble(dense, blocks, tmp_path / "model", left))
    assert model.raw_config["num_dense_layers"] == first_sparse
    check_engines(model, tmp_path / "cut.gguf")
