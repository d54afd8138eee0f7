"""Gemma 3n: several hidden states of a token, dropped activations, and what of it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from racdeploy import plugins
from racdeploy.engines.backends import llamacpp, transformers
from racdeploy.engines.backends.transformers.torch_model import load_model, round_as_ggml
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting.gguf import export
from racdeploy.exporting.gguf.parameters import check_parameters
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.block_inputs import BlockInputs
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.recipe import Structure
from tests.support.errors import raises
from tests.support.tiny_models import FAMILIES, SHARING, edit_json, make_checkpoint

pytestmark = pytest.mark.skipif(
    "gemma3n_text" not in FAMILIES, reason="transformers 4 shares its keys through a cache alone"
)
IDS = torch.randint(0, 480, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "gemma3n_text", dtype="float32")


def test_the_walk_ends_with_the_models_last_hidden_state(tmp_path: Path) -> None:
    """One is made of four, for tokens without an input of their own, too."""
    few = {"vocab_size_per_layer_input": 500}
    folder = make_checkpoint(tmp_path / "model", "gemma3n_text", dtype="float32", **few)
    checkpoint = Checkpoint(folder)
    ids_BT = IDS[None].clone()
    ids_BT[0, 7] = 505
    batch = Batch(ids_BT, torch.zeros_like(ids_BT), torch.zeros(1, dtype=torch.long), False)
    blocks, block_inputs = BlockwiseModel(checkpoint), BlockInputs(ids_BT)

    with torch.inference_mode():
        (hidden_BTD,) = blocks.embed([batch])
        assert tuple(hidden_BTD.shape) == (1, 40, 4 * 64)
        assert blocks.shape.hidden_states_width == 4 * 64
        for index in range(checkpoint.shape.block_count):
            hidden_BTD = blocks.forward(
                blocks.load_block(index), hidden_BTD, block_inputs=block_inputs
            )
        found_BTD = blocks.load_final_norm()(hidden_BTD)
        model = load_model(checkpoint).get_submodule("model")
        wanted_BTD = model(input_ids=ids_BT, use_cache=False).last_hidden_state

    torch.testing.assert_close(found_BTD, wanted_BTD, rtol=1e-5, atol=1e-5)


def test_llama_answers_as_torch_does(tmp_path: Path) -> None:
    """Greedily, with keys that are shared, beyond the window, prompts of different lengths at once.

    Both drop as many activations: torch does not, of itself, by a share of 96.
    """
    folder = make_checkpoint(tmp_path / "model", "gemma3n_text", dtype="float32", **SHARING)
    checkpoint = Checkpoint(folder)
    file = export(checkpoint, tmp_path / "model.gguf", quant="f32").path
    prompts = [IDS[:5].tolist(), IDS[5:14].tolist(), IDS[14:37].tolist()]
    sampling = Sampling(max_new_tokens=8, temperature=0.0, stop_ids=())

    settings = EngineSettings(context_tokens=64, parallel=3, cache_dtype="f32")
    with transformers.open_engine(folder, settings) as engine:
        own = engine.generate(prompts, sampling)
        with round_as_ggml(engine._model, checkpoint.shape):
            expected = engine.generate(prompts, sampling)
        assert own == engine.generate(prompts, sampling) != expected  # as it was before

    with llamacpp.open_engine(file, settings) as engine:
        assert [found.ids for found in engine.generate(prompts, sampling)] == [
            found.ids for found in expected
        ]


def test_a_published_folder_is_read(tmp_path: Path) -> None:
    """It has a width for each block, keys that nobody takes, and a text model inside a larger one.

    A file of it has zeros in place of these keys.
    """
    text = make_checkpoint(tmp_path / "text", "gemma3n_text", dtype="float32", **SHARING)
    config = json.loads((text / "config.json").read_text())
    assert config["intermediate_size"] == [96] * 22

    tensors = {}
    for name, value in load_file(text / "model.safetensors").items():
        tensors[f"model.language_model.{name.removeprefix('model.')}"] = value
        if ".layers.19.self_attn." in name:
            tensors[f"model.language_model.layers.21.{name.partition('.19.')[2]}"] = value + 1
    save_file(tensors, text / "model.safetensors")
    edit_json(text / "config.json", model_type="gemma3n", text_config=config)

    checkpoint = Checkpoint(text)
    assert checkpoint.shape.integer("intermediate_size") == 96
    assert checkpoint.notes[0].startswith("3 tensors are left out")
    plan = export(checkpoint, tmp_path / "model.gguf", quant="q8_0").tensors
    zeros = {tensor.name for tensor in plan if tensor.zeros == 1}
    assert zeros == {
        f"blk.{b}.attn_{what}.weight" for b in (20, 21) for what in ("k", "v", "k_norm")
    }


@pytest.mark.parametrize("part", [p for p in plugins.list_names("structures") if p != "experts"])
def test_nothing_is_cut(folder: Path, part: str, tmp_path: Path) -> None:
    """Before any work, with the reason."""
    (tmp_path / "text.txt").write_text("1 + 1")
    texts = (str(tmp_path / "text.txt"),) if part == "vocabulary" else ()
    structure = Structure(keep={part: 0.5}, vocabulary_text=texts)
    with raises("part-cannot-be-cut", part, "Gemma3nForCausalLM"):
        plugins.load("structures", part).check(Checkpoint(folder), structure)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"intermediate_size": [96, 96, 96, 96, 128]}, "unsupported-variant"),
        ({"intermediate_size": [96, 96]}, "unsupported-variant"),
        ({"intermediate_size": [1 << 40] * 5}, "damaged-config"),
        ({"vocab_size_per_layer_input": 513}, "damaged-config"),
    ],
)
def test_other_models_of_its_kind_are_refused(
    folder: Path, changes: dict[str, object], code: str
) -> None:
    """Blocks of different widths, which llama.cpp has no form for, and nonsense."""
    edit_json(folder / "config.json", **changes)
    with raises(code, *changes):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [
        # its keys come from a block of its kind, of which there is only one by default
        {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 5},
        {"activation_sparsity_pattern": [0.95, 0.95, 0.95, 0.95, 0.0]},
        {"activation_sparsity_pattern": None},  # 10 blocks and fewer drop none
        {"final_logit_softcapping": 20.0},
        {"hidden_size_per_layer_input": 128},
        {"altup_num_inputs": 3},
        {"altup_correct_scale": False},
        {"laurel_rank": 32},
    ],
)
def test_what_llama_computes_otherwise_is_refused(folder: Path, changes: dict[str, object]) -> None:
    """It has these numbers in its source, whatever the file says."""
    check_parameters(Checkpoint(folder).shape)
    edit_json(folder / "config.json", **changes)
    with raises("unsupported-by-llama-cpp", next(iter(changes))):
        check_parameters(Checkpoint(folder).shape)
