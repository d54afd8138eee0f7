"""GPT-OSS, whose experts are one tensor on disk: pruned one by one, and whole ones removed."""

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

from racdeploy import plugins
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import find_expert
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import read_cut_plan
from racdeploy.pruning.structures.vocabulary import rewrite
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.recipe import Pruning, Structure
from racdeploy.recovery.training_run import list_trained
from racdeploy.results.pruning import BlockRow, LinearRow
from racdeploy.tensors.mxfp4 import Mxfp4Entry
from tests.support.errors import raises
from tests.support.expert_costs import estimate_costs
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import make_trace

CALIBRATION = [make_trace(i, 5 + i % 7, 30, 4) for i in range(16)]
HELD_OUT = [make_trace(60 + i, 6, 20, 3) for i in range(3)]
E, LOUD, UNUSED = 8, 3, 6
FUSED = {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three blocks of eight experts: one is loud and often chosen, and one never, by its bias."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    sizes = {"num_local_experts": E, "num_hidden_layers": 3, "head_dim": 32}
    make_checkpoint(folder, "gpt_oss", tied=False, dtype="float32", **sizes)
    weights = load_file(folder / "model.safetensors")
    for block in range(3):
        mlp = f"model.layers.{block}.mlp"
        weights[f"{mlp}.experts.down_proj"][LOUD] *= 6
        weights[f"{mlp}.router.bias"][LOUD] += 1
        weights[f"{mlp}.router.bias"][UNUSED] = -100
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def run(
    dense: Checkpoint, folder: Path, keep: Mapping[str, float], **settings: Any
) -> tuple[Checkpoint, list[LinearRow], list[BlockRow]]:
    """Cut and prune, and return the model as it is read back."""
    structure = Structure(keep=dict(keep), uniform=True)
    blocks = folder / "blocks"
    blocks.mkdir(parents=True)
    given = Pruning.model_validate({"expert_tokens": 1, **settings})
    rows = prune_blocks(dense, CALIBRATION, HELD_OUT, given, blocks, structure=structure)
    shape = read_cut_plan(blocks).shape(dense.shape, structure)
    return Checkpoint(assemble(dense, blocks, folder / "model", shape)), *rows


@pytest.fixture(scope="module")
def cut(
    dense: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, list[LinearRow], list[BlockRow]]:
    """Two experts and half of the heads gone, half of what is left zero."""
    folder = tmp_path_factory.mktemp("cut")
    return run(dense, folder, {"experts": 0.75, "heads": 0.5}, sparsity=0.5)


def last_states(checkpoint: Checkpoint) -> torch.Tensor:
    model: Any = load_model(checkpoint)
    model.model.norm = torch.nn.Identity()
    with torch.inference_mode():
        found = [model.model(input_ids=torch.tensor([trace.ids])) for trace in HELD_OUT]
    return torch.cat([each.last_hidden_state[0] for each in found])


def test_every_expert_is_pruned_and_the_drift_is_that_of_whole_models(
    dense: Checkpoint, cut: tuple[Checkpoint, list[LinearRow], list[BlockRow]]
) -> None:
    """On held-out traces; the router stays dense, and errors do not count biases."""
    model, rows, blocks = cut
    assert len(rows) == 3 * (4 + 3 * 6)
    for row in rows:
        assert row.actual_sparsity == pytest.approx(0.5, abs=0.01), row.name
        assert np.mean(model.read(f"{row.name}.weight") == 0) == pytest.approx(0.5, abs=0.01)
        assert row.held_out_error is None or 0 < row.held_out_error < 1

    dense_ND, sparse_ND = map(last_states, (dense, model))
    drift = (sparse_ND - dense_ND).square().sum() / dense_ND.square().sum()
    assert blocks[-1].drift == pytest.approx(float(drift), rel=1e-3)


def test_who_is_missed_most_stays_with_all_that_is_its_own(
    dense: Checkpoint, tmp_path: Path
) -> None:
    """Rows and biases of the router, weights of the experts; who is never asked goes."""
    left, *_ = run(dense, tmp_path, {"experts": 0.75}, sparsity=0.0, target="linear_output")
    for block in range(3):
        report = tmp_path / "blocks" / f"block-{block:05d}.json"
        kept = json.loads(report.read_text())["kept"]["experts"]
        assert len(kept) == 6
        assert LOUD in kept
        assert UNUSED not in kept

        prefix = f"model.layers.{block}.mlp"
        for name in ("router.weight", "router.bias"):
            own = dense.read(f"{prefix}.{name}")[kept]
            np.testing.assert_array_equal(left.read(f"{prefix}.{name}"), own)
        for number, expert in enumerate(kept):
            for linear in ("gate_proj.weight", "up_proj.bias", "down_proj.bias"):
                own = dense.read(f"{prefix}.experts.{expert}.{linear}")
                found = left.read(f"{prefix}.experts.{number}.{linear}")
                np.testing.assert_array_equal(found, own)


def test_the_cost_of_an_expert_is_that_of_its_removal(dense: Checkpoint, tmp_path: Path) -> None:
    """Against the block whose router is without it, its bias too, token by token."""
    with torch.inference_mode():
        block, costs, outputs = estimate_costs(dense, CALIBRATION, tmp_path, 0)
        whole_ND = outputs()
        experts, router = list(block.mlp.experts), block.mlp.router
        weight_ED, bias_E = router.weight.data, router.bias.data
        for expert in range(E):
            others = [other for other in range(E) if other != expert]
            block.mlp.experts = type(block.mlp.experts)([experts[other] for other in others])
            router.weight.data, router.bias.data = weight_ED[others], bias_E[others]
            change_N = (outputs() - whole_ND).square().sum(1) / whole_ND.square().sum(1)
            assert costs[expert] == pytest.approx(float(change_N.sum()), rel=1e-3, abs=1e-6)

    assert max(costs, key=costs.__getitem__) == LOUD
    assert costs[UNUSED] == 0


def test_transformers_opens_what_is_left(
    cut: tuple[Checkpoint, list[LinearRow], list[BlockRow]],
) -> None:
    """In the layout that it reads, sinks of the heads that stay with them."""
    model, *_ = cut
    stored = load_file(model.folder / "model.safetensors")
    names = {name.rpartition(".")[2] for name in stored if ".experts." in name}
    assert names == FUSED
    assert stored["model.layers.0.mlp.experts.gate_up_proj"].shape == (6, 64, 2 * 32)
    assert stored["model.layers.0.self_attn.sinks"].shape == (2,)

    theirs = AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.tensor([CALIBRATION[0].ids])
    with torch.inference_mode():
        expected, found = theirs(input_ids=ids).logits, load_model(model)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_packed_model_leaves_one_that_is_not(tmp_path: Path) -> None:
    """Settings no longer say that experts are MXFP4; nor do those of a cut vocabulary."""
    folder = make_checkpoint(tmp_path / "packed", "gpt_oss", tied=False, mxfp4=True)
    packed = Checkpoint(folder)
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    prune_blocks(packed, CALIBRATION[:4], [], Pruning(sparsity=0.5), blocks)
    pruned = Checkpoint(assemble(packed, blocks, tmp_path / "pruned"))
    assert "quantization_config" in packed.raw_config
    assert "quantization_config" not in pruned.raw_config
    assert not any(isinstance(entry, Mxfp4Entry) for entry in pruned.entries.values())

    few = Checkpoint(rewrite(packed, np.arange(485), tmp_path / "few"))
    assert "quantization_config" not in few.raw_config
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    np.testing.assert_array_equal(few.read(name), packed.read(name))


def test_routers_are_not_trained(dense: Checkpoint) -> None:
    """Neither their rows nor their biases, while those of experts and sinks are."""
    trained = list_trained(dense)
    assert not [name for name in trained if "router" in name]
    experts = [name for name in trained if find_expert(name) is not None]
    assert len(experts) == 3 * E * 6
    assert "model.layers.0.self_attn.sinks" in trained


def test_fewer_experts_than_a_token_has_are_refused(dense: Checkpoint) -> None:
    with raises("share-not-reachable", "token to 2"):
        plugins.load("structures", "experts").check(dense, Structure(keep={"experts": 0.125}))
