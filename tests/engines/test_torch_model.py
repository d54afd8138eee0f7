"""Models whose parts were cut, under torch: as the whole model with zeros in their place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from tests.support.cut_models import Cut, cut_checkpoint, pad_checkpoint
from tests.support.errors import raises
from tests.support.more import some
from tests.support.tiny_models import CUT_FAMILIES, LONGROPE, YARN, edit_json, make_checkpoint

# Float32 sums in another order: 64 to 96 terms of 6e-8 relative, through a few blocks.
_SAME = {"rtol": 1e-4, "atol": 2e-5}


def _compute(model: torch.nn.Module) -> torch.Tensor:
    ids_BT = torch.randint(0, 480, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits_BTV: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits_BTV


def _make_cut(kind: str, blocks: int) -> Cut:
    """Return query heads and channels of each block: 4 and 96 of the whole."""
    if kind == "uniform":
        return [(2, 64)] * blocks
    return [((4, 2)[block % 2], (32, 96, 64)[block % 3]) for block in range(blocks)]


@pytest.mark.parametrize("kind", ["uniform", "per block"])
@pytest.mark.parametrize("family", some(CUT_FAMILIES))
def test_a_cut_model_computes_as_the_whole_one_with_zeros(
    family: str, kind: str, tmp_path: Path
) -> None:
    """Heads and channels whose outputs are multiplied by zero are those that are left out."""
    whole = make_checkpoint(tmp_path / "whole", family, dtype="float32")
    cut = _make_cut(kind, Checkpoint(whole).shape.block_count)

    small = Checkpoint(cut_checkpoint(whole, tmp_path / "small", cut))
    zeroed = Checkpoint(pad_checkpoint(whole, tmp_path / "zeroed", cut))

    assert small.shape.is_uniform == (kind == "uniform")
    logits_BTV = _compute(load_model(small))
    torch.testing.assert_close(logits_BTV, _compute(load_model(zeroed)), **_SAME)
    assert not torch.allclose(logits_BTV, _compute(load_model(Checkpoint(whole))), atol=0.01)


@pytest.mark.parametrize("family", some(CUT_FAMILIES))
def test_transformers_opens_a_uniform_cut_itself(family: str, tmp_path: Path) -> None:
    """What all blocks have in common is in the keys of transformers' own configuration."""
    whole = make_checkpoint(tmp_path / "whole", family, dtype="float32")
    cut = [(2, 64)] * Checkpoint(whole).shape.block_count
    small = cut_checkpoint(whole, tmp_path / "small", cut)

    theirs = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    torch.testing.assert_close(_compute(load_model(Checkpoint(small))), _compute(theirs), **_SAME)


def _compare_with_skipping(small: Path, whole: Path, blocks: Sequence[int]) -> None:
    """A model of some blocks computes what the whole one does that skips the others."""
    skipping: Any = load_model(Checkpoint(whole))
    layers = skipping.model.layers
    skipping.model.layers = torch.nn.ModuleList(layers[block] for block in blocks)
    kinds = getattr(skipping.config, "layer_types", None)  # read by transformers 5 alone
    if len(set(kinds or ())) > 1:
        skipping.config.layer_types = [kinds[block] for block in blocks]
    torch.testing.assert_close(_compute(load_model(Checkpoint(small))), _compute(skipping), **_SAME)


@pytest.mark.parametrize("family", some(CUT_FAMILIES))
def test_a_model_without_a_block_computes_as_the_whole_one_that_skips_it(
    family: str, tmp_path: Path
) -> None:
    """Kinds of attention, windows and rotary embeddings stay with the blocks that had them."""
    whole = make_checkpoint(tmp_path / "whole", family, dtype="float32", num_hidden_layers=6)
    blocks = (0, 2, 3, 4, 5)
    small = cut_checkpoint(whole, tmp_path / "small", [(4, 96)] * 5, blocks)

    _compare_with_skipping(small, whole, blocks)


@pytest.mark.parametrize("family", some(CUT_FAMILIES))
def test_the_walk_computes_a_model_of_different_blocks(family: str, tmp_path: Path) -> None:
    """Block after block, filled and run as pruning does, is the model that is loaded at once."""
    whole = make_checkpoint(tmp_path / "whole", family)
    cut = _make_cut("per block", Checkpoint(whole).shape.block_count)
    checkpoint = Checkpoint(cut_checkpoint(whole, tmp_path / "small", cut))

    ids_BT = torch.randint(0, 480, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids_BT, torch.zeros_like(ids_BT), torch.zeros(2, dtype=torch.long), False)
    blocks = BlockwiseModel(checkpoint)

    with torch.inference_mode():
        states = load_model(checkpoint)(input_ids=ids_BT, output_hidden_states=True).hidden_states
        (hidden_BTD,) = blocks.embed([batch])
        for index in range(checkpoint.shape.block_count):
            torch.testing.assert_close(hidden_BTD, states[index], rtol=1e-5, atol=1e-5)
            hidden_BTD = blocks.forward(blocks.load_block(index), hidden_BTD)


@pytest.mark.parametrize(
    ("family", "counted"),
    [("gemma3_text", {"sliding_window_pattern": 3}), ("smollm3", {"no_rope_layer_interval": 3})],
)
def test_kinds_that_the_config_counts_stay_with_their_blocks(
    family: str, counted: dict[str, int], tmp_path: Path
) -> None:
    """Old configurations say that every n-th block differs; without a block, others would."""
    whole = make_checkpoint(tmp_path / "whole", family, dtype="float32", num_hidden_layers=6)
    listed = {"layer_types": None, "no_rope_layers": None}
    edit_json(whole / "config.json", **listed, _sliding_window_pattern=None, **counted)
    blocks = (0, 2, 3, 4, 5)
    small = cut_checkpoint(whole, tmp_path / "small", [(4, 96)] * 5, blocks)

    _compare_with_skipping(small, whole, blocks)


def test_heads_that_transformers_needs_are_missed_in_a_message(tmp_path: Path) -> None:
    """It derives the width of a head of Phi-3 to compare long factors with it."""
    whole = make_checkpoint(
        tmp_path / "whole",
        "phi3",
        original_max_position_embeddings=64,
        rope_scaling=LONGROPE,
    )
    small = cut_checkpoint(whole, tmp_path / "small", [(2, 96)] * 2)
    with raises("transformers-refuses", "short_factor"):
        load_model(Checkpoint(small))


def test_biases_and_rope_scaling_go_along(tmp_path: Path) -> None:
    whole = make_checkpoint(
        tmp_path / "whole",
        "llama",
        dtype="float32",
        tied=False,
        attention_bias=True,
        rope_scaling=YARN,
        num_attention_heads=8,
    )
    cut = [(8, 32), (4, 96)]
    small = Checkpoint(cut_checkpoint(whole, tmp_path / "small", cut))
    zeroed = Checkpoint(pad_checkpoint(whole, tmp_path / "zeroed", cut))
    torch.testing.assert_close(_compute(load_model(small)), _compute(load_model(zeroed)), **_SAME)


def test_a_width_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", "qwen3")
    small = cut_checkpoint(whole, tmp_path / "small", [(4, 32), (2, 96)])
    widths = {"intermediate_size": [32, 64], "num_attention_heads": [4, 2]}
    edit_json(small / "config.json", racdeploy_block_widths=widths)

    with raises("wrong-tensor-shape", "layers.1.mlp.gate_proj", "96", "64"):
        load_model(Checkpoint(small))
