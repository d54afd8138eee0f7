"""Experts chosen by sigmoids and a bias, in some blocks, and removed: LFM2's and Nemotron's."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from racdeploy import plugins, recovery
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.exporting.gguf import export
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import list_structure_rows, read_cut_plan
from racdeploy.pruning.walk.assemble import CutShape, assemble
from racdeploy.recipe import Pruning, Structure
from tests.support.errors import raises
from tests.support.expert_costs import estimate_costs
from tests.support.llama_child import ask_llama
from tests.support.tiny_models import FAMILIES, NEMOTRON_EXPERTS, make_checkpoint
from tests.support.tiny_traces import make_trace
from tests.support.tiny_training_run import make_training_run, read_weights

CALIBRATION = [make_trace(i, 5 + i % 7, 30, 4) for i in range(16)]
E = 8
IDS = torch.randint(0, 480, (1, 60), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """A family, and what is in its blocks.

    Args:
        sparse: blocks with experts.
        linears: number of linears after two experts of eight are gone.
        router: tensors that lose rows with the experts, by what their names begin with.
    """

    config: dict[str, Any]
    blocks: int
    sparse: tuple[int, ...]
    linears: int
    router: tuple[str, str]
    module: str


CASES = {
    "lfm2_moe": Case(
        {"num_experts": E},
        blocks=3,
        sparse=(1, 2),
        linears=(2 + 3) + (4 + 6 * 3) + (2 + 6 * 3),
        router=("gate.weight", "expert_bias"),
        module="feed_forward",
    ),
    "nemotron_h": Case(
        {**NEMOTRON_EXPERTS, "n_routed_experts": E},
        blocks=5,
        sparse=(1, 4),
        linears=2 + (6 * 2 + 2) + 4 + 2 + (6 * 2 + 2),
        router=("gate.weight", "gate.e_score_correction_bias"),
        module="mixer",
    ),
}
NAMES = [name for name in CASES if name in FAMILIES]
pytestmark = pytest.mark.skipif(not NAMES, reason="transformers 4 has none of these families")


@pytest.fixture(scope="module", params=NAMES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("experts") / request.param
    config = CASES[request.param].config
    return Checkpoint(make_checkpoint(folder, request.param, dtype="float32", **config))


@pytest.fixture
def case(dense: Checkpoint) -> Case:
    return CASES[dense.folder.name]


def compute(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits_BTV: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits_BTV


def check_engines(model: Checkpoint, file: Path) -> None:
    """Compare torch, transformers and llama.cpp; rounding errors are near 1e-6."""
    own_BTV = compute(load_model(model))
    theirs: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    if model.tied:  # which transformers does not do for Nemotron
        theirs.lm_head.weight = theirs.get_input_embeddings().weight
    torch.testing.assert_close(own_BTV, compute(theirs), rtol=1e-5, atol=1e-5)

    (answer,) = ask_llama([export(model, file, quant="f32").path], IDS[0].tolist())
    assert np.abs(answer.logits_TV - own_BTV[0].numpy()).max() < 1e-4 * own_BTV.abs().max()


def test_experts_go_with_their_rows_of_the_router_and_of_the_bias(
    dense: Checkpoint, case: Case, tmp_path: Path
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
    assert [(row.experts, row.experts_dense) for row in rows] == [
        (6, E) if block in case.sparse else (0, 0) for block in range(case.blocks)
    ]
    assert len(linears) == case.linears
    assert {round(row.actual_sparsity, 2) for row in linears} == {0.5}

    stored = load_file(model.folder / "model.safetensors")
    for block in case.sparse:
        kept = json.loads((blocks / f"block-{block:05d}.json").read_text())["kept"]["experts"]
        for name in case.router:
            full = f"model.layers.{block}.{case.module}.{name}"
            np.testing.assert_array_equal(stored[full], dense.read(full)[kept])
    check_engines(model, tmp_path / "cut.gguf")


def test_the_cost_of_an_expert_is_that_of_its_removal(
    dense: Checkpoint, case: Case, tmp_path: Path
) -> None:
    """Against the block whose router is without it, token by token."""
    name = f"{case.module}.{case.router[1]}"
    with torch.inference_mode():
        block, costs, outputs = estimate_costs(dense, CALIBRATION, tmp_path, case.sparse[0])
        whole_ND = outputs()
        parameter = block.get_parameter(name)
        bias_E = parameter.data
        for expert in range(E):
            parameter.data = bias_E.clone()
            parameter.data[expert] = -torch.inf
            change_N = (outputs() - whole_ND).square().sum(1) / whole_ND.square().sum(1)
            assert costs[expert] == pytest.approx(float(change_N.sum()), rel=1e-3, abs=1e-6)


def list_recoveries() -> list[Any]:
    """Return the first family with every method and each with one; the others are marked."""
    pairs = []
    for family, method in itertools.product(NAMES, plugins.list_names("recover_methods")):
        is_kept = family == NAMES[0] or method == "blockwise"
        marks = [] if is_kept else [pytest.mark.more]
        pairs.append(pytest.param(family, method, marks=marks))
    return pairs


@pytest.mark.parametrize(("family", "method"), list_recoveries())
def test_what_is_left_comes_nearer_to_the_dense_model(
    tmp_path: Path, family: str, method: str
) -> None:
    """And the chosen experts, zeros and the bias of the choice stay."""
    cut = Structure(keep={"experts": 0.75}, uniform=True)
    training_run = make_training_run(tmp_path, family=family, structure=cut, **CASES[family].config)
    first, *later = recovery.load(method).recover(training_run)
    training_run.write()
    found = [look.kl_nats for look in later if look.kl_nats is not None]
    assert first.kl_nats is not None
    assert min(found) < 0.995 * first.kl_nats

    before, after = map(read_weights, (training_run.sparse.folder, training_run.out))
    for name, value in before.items():
        assert value.shape == after[name].shape
        if name in training_run.masked_weights:
            assert not after[name][value == 0].any()
        if name.endswith(CASES[family].router[1]):
            assert torch.equal(value, after[name])


def keep_blocks(dense: Checkpoint, kept: tuple[int, ...], folder: Path) -> Checkpoint:
    blocks = folder / "blocks"
    blocks.mkdir()
    left = CutShape(kept, [dense.shape.sizes[block] for block in kept])
    return Checkpoint(assemble(dense, blocks, folder / "model", left))


@pytest.mark.parametrize("dense", [name for name in NAMES if name == "lfm2_moe"], indirect=True)
@pytest.mark.parametrize(("kept", "first_sparse"), [((1, 2), 0), ((0, 1), 1)])
def test_blocks_that_stay_have_experts_or_none_as_before(
    dense: Checkpoint, tmp_path: Path, kept: tuple[int, ...], first_sparse: int
) -> None:
    """The number of first blocks without experts is counted again."""
    model = keep_blocks(dense, kept, tmp_path)
    assert model.raw_config["num_dense_layers"] == first_sparse
    check_engines(model, tmp_path / "cut.gguf")


@pytest.mark.parametrize("dense", [name for name in NAMES if name == "nemotron_h"], indirect=True)
@pytest.mark.parametrize(
    ("kept", "letters", "arch"),
    [((1, 2, 3), "E*M", "nemotron_h_moe"), ((0, 2), "M*", "nemotron_h")],
)
def test_a_model_without_its_blocks_of_experts_is_one_without_experts(
    dense: Checkpoint, tmp_path: Path, kept: tuple[int, ...], letters: str, arch: str
) -> None:
    """Whatever its config still says of experts."""
    model = keep_blocks(dense, kept, tmp_path)
    assert model.raw_config["hybrid_override_pattern"] == letters
    assert model.family.gguf_arch == arch
    check_engines(model, tmp_path / "cut.gguf")


@pytest.mark.skipif("nemotron_h" not in FAMILIES, reason="transformers 4 has none")
def test_groups_of_experts_are_computed_and_not_cut(tmp_path: Path) -> None:
    """A router that chooses two of four groups first; groups that are all chosen are none."""
    config = {**NEMOTRON_EXPERTS, "n_routed_experts": E, "n_group": 4}
    folder = make_checkpoint(
        tmp_path / "grouped", "nemotron_h", tied=False, dtype="float32", topk_group=2, **config
    )
    model = Checkpoint(folder)
    own_BTV = compute(load_model(model))
    (answer,) = ask_llama([export(model, tmp_path / "a.gguf", quant="f32").path], IDS[0].tolist())
    assert np.abs(answer.logits_TV - own_BTV[0].numpy()).max() < 1e-4 * own_BTV.abs().max()

    with raises("part-cannot-be-cut", "groups"):
        plugins.load("structures", "experts").check(model, Structure(keep={"experts": 0.75}))

    folder = make_checkpoint(tmp_path / "whole", "nemotron_h", topk_group=4, **config)
    shape = Checkpoint(folder).shape
    assert (shape.integer("n_group"), shape.integer("topk_group")) == (1, 1)
