"""The importance of a dense model's inputs, from the walk that cuts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import read_cut_plan
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.recipe import Pruning, Recipe, Structure
from racdeploy.traces.trace import hash_ids
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("dense") / "model"
    sizes = {"num_hidden_layers": 3, "intermediate_size": 128}
    return Checkpoint(make_checkpoint(folder, "llama", dtype="float32", **sizes))


def cut(dense: Checkpoint, out: Path, keep: dict[str, float]) -> Path:
    """Cut without zeros, and return the model's folder."""
    structure = Structure(keep=keep, uniform=True)
    blocks = out / "blocks"
    blocks.mkdir(parents=True)
    prune_blocks(dense, TRACES, [], Pruning(sparsity=0.0), blocks, structure=structure)
    shape = read_cut_plan(blocks).shape(dense.shape, structure)
    return assemble(dense, blocks, out / "model", shape)


def mean_squares(dense: Checkpoint, linear: str) -> torch.Tensor:
    """Return those of a linear's inputs, over all tokens, with transformers' own model."""
    model = load_model(dense)
    seen: list[torch.Tensor] = []

    def remember(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].double().reshape(-1, inputs[0].shape[-1]))

    model.get_submodule(linear).register_forward_pre_hook(remember)
    with torch.inference_mode():
        for trace in TRACES:
            model(input_ids=torch.tensor([trace.ids]))
    return torch.cat(seen).square().mean(0)


def test_it_is_of_all_inputs_by_dense_names(dense: Checkpoint, tmp_path: Path) -> None:
    """Until the first cut both models see the same: the first block's are torch's mean squares.

    Float32 products of some hundred tokens: the relative error is below their number times 2^-24.
    """
    model = cut(dense, tmp_path, {"ffn": 0.5})
    found = load_file(model / "dense-importance.safetensors")
    assert {name for name in found if not name.endswith(".tokens")} == set(
        dense.shape.prunable_weights
    )
    tokens = sum(len(trace.ids) for trace in TRACES)

    for linear in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
        name = f"model.layers.0.{linear}"
        expected_I = mean_squares(dense, name)
        torch.testing.assert_close(
            found[f"{name}.weight"].double(), expected_I, rtol=tokens * 2**-24, atol=1e-9
        )
    own = load_file(model / "importance.safetensors")
    assert own["model.layers.0.mlp.down_proj.weight"].shape == (64,)


def test_blocks_that_went_have_none(dense: Checkpoint, tmp_path: Path) -> None:
    """The others have theirs by their numbers in the dense model."""
    model = cut(dense, tmp_path, {"blocks": 2 / 3})
    kept = read_cut_plan(tmp_path / "blocks").blocks
    found = load_file(model / "dense-importance.safetensors")
    numbers = {int(name.split(".")[2]) for name in found}
    assert numbers == set(kept)
    assert len(kept) == 2


def test_a_whole_model_needs_no_second_one(dense: Checkpoint, tmp_path: Path) -> None:
    """Both arms have the same names and inputs."""
    model = cut(dense, tmp_path, {})
    assert (model / "importance.safetensors").is_file()
    assert not (model / "dense-importance.safetensors").exists()


def test_that_of_an_earlier_cut_is_not_taken_along(tmp_path: Path) -> None:
    """A model that was cut before is dense now; its folder has the importance of a larger one."""
    sizes = {"intermediate_size": 128}
    model = make_checkpoint(tmp_path / "model", "llama", dtype="float32", **sizes)
    save_file({"stale": torch.zeros(1)}, model / "dense-importance.safetensors")
    values = {"model": str(model), "structure": {"keep": {"ffn": 0.5}}}
    build = Build(Job(Recipe.combine(None, values)), tmp_path, threads=1)

    pruned = build.prune_stage.run(TRACES, hash_ids(TRACES))
    found = load_file(pruned.folder / "dense-importance.safetensors")
    assert found["model.layers.0.mlp.down_proj.weight"].shape == (128,)
    assert "stale" not in found
