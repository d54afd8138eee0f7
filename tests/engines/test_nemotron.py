"""Nemotron-H: published names, what is refused, and steps of a state without a floor."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.walk.assemble import CutShape, assemble
from tests.support.errors import raises
from tests.support.nemotron import follow_config
from tests.support.tiny_models import FAMILIES, edit_json, make_checkpoint

pytestmark = pytest.mark.skipif("nemotron_h" not in FAMILIES, reason="transformers 4 has none")
IDS = torch.randint(0, 480, (1, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nemotron")
    return make_checkpoint(root / "model", "nemotron_h", tied=False, dtype="float32")


def _compute(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        logits_BTV: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits_BTV


def test_published_names_are_read_and_ours_are_written(folder: Path, tmp_path: Path) -> None:
    """A cut model has transformers' names and lists its blocks as published; transformers and we
    compute the same with it.
    """
    assert "backbone.embeddings.weight" in load_file(folder / "model.safetensors")
    dense = Checkpoint(folder)
    assert dense.shape.layer_types == (
        *("linear_attention", "mlp", "full_attention"),
        *("linear_attention", "mlp"),
    )

    blocks = tmp_path / "blocks"
    blocks.mkdir()
    left = CutShape((1, 2, 3), dense.shape.sizes[1:4])
    cut = Checkpoint(assemble(dense, blocks, tmp_path / "cut", left))
    assert "model.embeddings.weight" in load_file(cut.folder / "model.safetensors")
    assert cut.raw_config["hybrid_override_pattern"] == "-*M"
    assert cut.shape.block_count == 3

    theirs = AutoModelForCausalLM.from_pretrained(cut.folder, dtype=torch.float32).eval()
    torch.testing.assert_close(_compute(load_model(cut)), _compute(theirs))


def test_a_step_of_a_state_is_as_short_as_the_config_says(folder: Path, tmp_path: Path) -> None:
    """The floor of transformers under it, here a high one, changes the logits by far more than
    rounding.
    """
    folder = shutil.copytree(folder, tmp_path / "model")
    edit_json(folder / "config.json", time_step_min=0.05)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own_BTV, with_floor_BTV = _compute(load_model(Checkpoint(folder))), _compute(model)
    follow_config(model)
    torch.testing.assert_close(own_BTV, _compute(model))
    assert (own_BTV - with_floor_BTV).abs().max() > 1e-3 * own_BTV.abs().max()


@pytest.mark.parametrize(
    ("changes", "code", "value"),
    [
        ({"hybrid_override_pattern": "M-*ME"}, "unsupported-variant", "1 blocks"),
        ({"hybrid_override_pattern": "M-*Mx"}, "damaged-config", "'x'"),
        (
            {"layers_block_type": ["mamba", "attention", "moe"], "moe_latent_size": 16},
            "unsupported-variant",
            "moe_latent_size 16",
        ),
        (
            {"hybrid_override_pattern": None, "layers_block_type": ["conv"]},
            "damaged-config",
            "'conv'",
        ),
    ],
)
def test_blocks_that_cannot_be_are_named(
    tmp_path: Path, changes: dict[str, object], code: str, value: str
) -> None:
    """Before any tensor is read, in both ways to write them."""
    folder = make_checkpoint(tmp_path / "model", "nemotron_h")
    edit_json(folder / "config.json", **changes)
    with raises(code, value):
        Checkpoint(folder)
