"""Gemma 4: blocks that take keys of earlier ones, and what of it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from racdeploy import plugins
from racdeploy.engines.backends.transformers import open_engine
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting.gguf.parameters import check_parameters
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Structure
from tests.support.errors import raises
from tests.support.tiny_models import FAMILIES, edit_json, make_checkpoint

pytestmark = pytest.mark.skipif(
    "gemma4_text" not in FAMILIES, reason="transformers 4 has no Gemma 4"
)
_FULL, _SLIDING = "full_attention", "sliding_attention"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "gemma4_text", dtype="float32")


def test_the_last_blocks_take_the_keys_of_the_last_earlier_one_of_their_kind(folder: Path) -> None:
    """They have no linears for keys and values, and twice the channels; heads go by kind."""
    checkpoint = Checkpoint(folder)
    assert checkpoint.shape.kv_sources == (0, 1, 2, 1, 2)
    assert [len(checkpoint.shape.input_groups[block][0]) for block in range(5)] == [3, 3, 3, 1, 1]
    assert checkpoint.shape.widths["intermediate_size"] == (96, 96, 96, 192, 192)
    assert checkpoint.shape.widths["num_key_value_heads"] == (2, 2, 1, 2, 1)
    assert [sizes["K"] for sizes in checkpoint.shape.sizes] == [16, 16, 32, 16, 32]


def test_keys_that_nobody_takes_are_left_out(folder: Path) -> None:
    """Published files have them; the same without is computed, and that is said."""
    expected = set(Checkpoint(folder).entries)
    tensors = load_file(folder / "model.safetensors")
    for name in ("k_proj", "v_proj", "k_norm"):
        tensors[f"model.layers.3.self_attn.{name}.weight"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors")

    checkpoint = Checkpoint(folder)
    assert set(checkpoint.entries) == expected
    assert checkpoint.notes[0].startswith("3 tensors are left out")
    load_model(checkpoint)


def test_batches_are_decoded_as_the_model_computes(folder: Path) -> None:
    """Greedily, with a cache, beyond the window, prompts of different lengths at once."""
    ids = torch.randint(0, 480, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [ids[:5], ids[5:14], ids[14:37]]
    model = load_model(Checkpoint(folder))

    expected = []
    for prompt in prompts:
        known = list(prompt)
        for _ in range(8):
            with torch.inference_mode():
                logits_BTV = model(input_ids=torch.tensor([known]), use_cache=False).logits
            known.append(int(logits_BTV[0, -1].argmax()))
        expected.append(tuple(known[len(prompt) :]))

    engine = open_engine(folder, EngineSettings(context_tokens=64, parallel=3))
    sampling = Sampling(max_new_tokens=8, temperature=0.0, stop_ids=())
    assert expected == [found.ids for found in engine.generate(prompts, sampling)]
    engine.close()


@pytest.mark.parametrize("part", [p for p in plugins.list_names("structures") if p != "experts"])
def test_nothing_is_cut(folder: Path, part: str, tmp_path: Path) -> None:
    """Before any work, with the reason."""
    (tmp_path / "text.txt").write_text("1 + 1")
    texts = (str(tmp_path / "text.txt"),) if part == "vocabulary" else ()
    structure = Structure(keep={part: 0.5}, vocabulary_text=texts)
    with raises("part-cannot-be-cut", part, "Gemma4ForCausalLM"):
        plugins.load("structures", part).check(Checkpoint(folder), structure)


@pytest.mark.parametrize(
    ("changes", "code", "value"),
    [
        ({"enable_moe_block": True}, "unsupported-variant", "enable_moe_block"),
        ({"attention_k_eq_v": True}, "unsupported-variant", "attention_k_eq_v"),
        (
            {"hidden_size_per_layer_input": 0},
            "unsupported-variant",
            "hidden_size_per_layer_input",
        ),
        (
            {"per_layer_config": {"2": {"head_dim": 32}, "4": {"head_dim": 64}}},
            "unsupported-variant",
            "per_layer_config",
        ),
        ({"per_layer_config": {"0": {"head_dim": 32}}}, "unsupported-variant", "block 0"),
        ({"per_layer_config": {"2": {"head_dim": 1 << 40}}}, "damaged-config", "per_layer_config"),
        # None is left that sees all tokens.
        ({"num_kv_shared_layers": 3}, "damaged-config", "full_attention"),
    ],
)
def test_other_models_of_its_kind_are_refused(
    folder: Path, changes: dict[str, object], code: str, value: str
) -> None:
    """Larger ones are built otherwise; blocks of one kind that differ have no GGUF form."""
    edit_json(folder / "config.json", **changes)
    with raises(code, value):
        _ = Checkpoint(folder).shape.kv_sources


def test_keys_that_llama_would_take_from_another_block_are_refused(folder: Path) -> None:
    """It takes those of the last two blocks that make any: first a window, then none."""
    check_parameters(Checkpoint(folder).shape)
    kinds = [_FULL, _SLIDING, _SLIDING, _SLIDING, _FULL]
    edit_json(folder / "config.json", layer_types=kinds, per_layer_config={})
    with raises("unsupported-by-llama-cpp", "block 3", "block 2"):
        check_parameters(Checkpoint(folder).shape)
