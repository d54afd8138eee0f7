"""Granite 4 with experts beside a part that all tokens share: pruned one by one, and removed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.exporting.gguf import export
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import read_cut_plan
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.recipe import Pruning, Structure
from racdeploy.results.pruning import BlockRow, LinearRow
from tests.support.expert_costs import estimate_costs
from tests.support.llama_child import ask_llama
from tests.support.tiny_models import FAMILIES, GRANITE_EXPERTS, make_checkpoint
from tests.support.tiny_traces import make_trace

pytestmark = pytest.mark.skipif(
    "granitemoehybrid" not in FAMILIES, reason="transformers lacks the family"
)
CALIBRATION = [make_trace(i, 5 + i % 7, 30, 4) for i in range(24)]
HELD_OUT = [make_trace(60 + i, 6, 20, 3) for i in range(3)]
E, LOUD = 8, 3
BLOCKS = 3
Run = tuple[Checkpoint, list[LinearRow], list[BlockRow]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three blocks of eight experts, of which one is loud."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    sizes = GRANITE_EXPERTS | {"num_local_experts": E}
    make_checkpoint(folder, "granitemoehybrid", tied=False, dtype="float32", **sizes)
    weights = load_file(folder / "model.safetensors")
    for block in range(BLOCKS):
        weights[f"model.layers.{block}.block_sparse_moe.output_linear.weight"][LOUD] *= 6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def run(dense: Checkpoint, folder: Path, keep: Mapping[str, float], **settings: Any) -> Run:
    """Cut and prune, and return the model as it is read back."""
    structure = Structure(keep=dict(keep), uniform=True)
    blocks = folder / "blocks"
    blocks.mkdir(parents=True)
    given = Pruning.model_validate({"expert_tokens": 1, "sparsity": 0.5, **settings})
    rows = prune_blocks(dense, CALIBRATION, HELD_OUT, given, blocks, structure=structure)
    shape = read_cut_plan(blocks).shape(dense.shape, structure)
    return Checkpoint(assemble(dense, blocks, folder / "model", shape)), *rows


@pytest.fixture(scope="module")
def cut(dense: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two experts and a third of the shared channels gone, half of what is left zero."""
    return run(dense, tmp_path_factory.mktemp("cut"), {"experts": 0.75, "ffn": 2 / 3})


def compute(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits_TV: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits_TV


def last_states(checkpoint: Checkpoint) -> torch.Tensor:
    model: Any = load_model(checkpoint)
    model.model.norm = torch.nn.Identity()
    with torch.inference_mode():
        found = [model.model(input_ids=torch.tensor([trace.ids])) for trace in HELD_OUT]
    return torch.cat([each.last_hidden_state[0] for each in found])


def test_every_expert_is_pruned_and_the_drift_is_that_of_whole_models(
    dense: Checkpoint, cut: Run
) -> None:
    """On held-out traces; what is shared is pruned too, and the router stays dense."""
    model, rows, blocks = cut
    assert len(rows) == 2 * 2 + 4 + BLOCKS * (6 * 3 + 2)
    for row in rows:
        assert row.actual_sparsity == pytest.approx(0.5, abs=0.01), row.name
        assert np.mean(model.read(f"{row.name}.weight") == 0) == pytest.approx(0.5, abs=0.01)
        assert row.held_out_error is None or 0 < row.held_out_error < 1

    dense_ND, sparse_ND = map(last_states, (dense, model))
    drift = (sparse_ND - dense_ND).square().sum() / dense_ND.square().sum()
    assert blocks[-1].drift == pytest.approx(float(drift), rel=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_errors_are_below_those_of_magnitude(
    dense: Checkpoint, tmp_path: Path, pattern: str
) -> None:
    """At the end of every block, on held-out traces."""
    _, _, ours = run(dense, tmp_path / "ours", {}, pattern=pattern)
    _, _, theirs = run(dense, tmp_path / "theirs", {}, pattern=pattern, method="magnitude")
    for row, other in zip(ours, theirs, strict=True):
        assert row.drift is not None
        assert other.drift is not None
        assert 0 < row.drift < other.drift


def test_who_is_missed_most_stays_with_its_row_of_the_router(
    dense: Checkpoint, tmp_path: Path
) -> None:
    """And with its weights, which the file has in one tensor of all experts, as published."""
    left, *_ = run(dense, tmp_path, {"experts": 0.75}, sparsity=0.0, target="linear_output")
    stored = load_file(left.folder / "model.safetensors")

    for block in range(BLOCKS):
        report = tmp_path / "blocks" / f"block-{block:05d}.json"
        kept = json.loads(report.read_text())["kept"]["experts"]
        assert len(kept) == 6
        assert LOUD in kept

        prefix = f"model.layers.{block}.block_sparse_moe"
        own = dense.read(f"{prefix}.router.layer.weight")[kept]
        np.testing.assert_array_equal(stored[f"{prefix}.router.layer.weight"], own)
        assert stored[f"{prefix}.input_linear.weight"].shape == (6, 2 * 32, 64)
        for number, expert in enumerate(kept):
            whole = dense.read(f"{prefix}.experts.{expert}.up_proj.weight")
            found = stored[f"{prefix}.input_linear.weight"][number, 32:]
            np.testing.assert_array_equal(found, whole)


def test_the_cost_of_an_expert_is_that_of_its_removal(dense: Checkpoint, tmp_path: Path) -> None:
    """Against the block whose router is without it, token by token."""
    with torch.inference_mode():
        block, costs, outputs = estimate_costs(dense, CALIBRATION, tmp_path, 0)
        whole_ND, mixture = outputs(), block.block_sparse_moe
        experts, router = list(mixture.experts), mixture.router.layer
        weight_ED, residual = router.weight.data, dense.config["residual_multiplier"]
        for expert in range(E):
            others = [other for other in range(E) if other != expert]
            mixture.experts = type(mixture.experts)([experts[other] for other in others])
            router.weight.data = weight_ED[others]
            change_N = (outputs() - whole_ND).square().sum(1) / whole_ND.square().sum(1)
            wanted = float(change_N.sum()) / residual**2  # which all experts have in common
            assert costs[expert] == pytest.approx(wanted, rel=1e-3, abs=1e-6)

    assert max(costs, key=costs.__getitem__) == LOUD


def test_llama_cpp_and_transformers_compute_what_is_left(cut: Run, tmp_path: Path) -> None:
    """The cut and pruned model, whichever opens it; rounding errors are near 1e-6."""
    model, *_ = cut
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 480, 60)]
    own_TV = compute(load_model(model), ids)

    theirs = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    torch.testing.assert_close(own_TV, compute(theirs, ids), rtol=1e-5, atol=1e-5)

    file = export(model, tmp_path / "cut.gguf", quant="f32").path
    (answer,) = ask_llama([file], ids)
    assert np.abs(answer.logits_TV - own_TV.numpy()).max() < 1e-4 * own_TV.abs().max()


def test_some_linears_of_experts_may_have_codes_and_others_none(tmp_path: Path) -> None:
    """What lies in one tensor has one number format then: float32, which holds both."""
    dense = Checkpoint(make_checkpoint(tmp_path / "dense", "granitemoehybrid", **GRANITE_EXPERTS))
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    settings = Pruning(sparsity=0.5, ignore=("experts.*up_proj",))
    prune_blocks(dense, CALIBRATION[:4], [], settings, blocks, quant="q4_0")

    pruned = Checkpoint(assemble(dense, blocks, tmp_path / "pruned"))
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    own, found = (each.read(f"{prefix}.up_proj.weight") for each in (dense, pruned))
    np.testing.assert_array_equal(found, own)
    assert np.mean(pruned.read(f"{prefix}.gate_proj.weight") == 0) >= 0.5
