"""A model that also sees: its text part alone is read, pruned and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.walk.assemble import assemble
from tests.support.tiny_models import FAMILIES, edit_json, make_checkpoint

_PARTS = [name for name in ("gemma3_text", "gemma3n_text", "gemma4_text") if name in FAMILIES]
_IDS_BT = torch.arange(40)[None]


def _let_it_see(text: Path, folder: Path, begins: str) -> Path:
    """Write a text model as the part of a larger one, as transformers 4 or 5 names its tensors."""
    folder.mkdir()
    config = json.loads((text / "config.json").read_text())
    tensors = load_file(text / "model.safetensors")

    inside = {begins + name.removeprefix("model."): value for name, value in tensors.items()}
    other = {name: torch.ones(4, 4) for name in ("model.visual.blocks.0.weight", "mtp.fc.weight")}
    save_file(inside | other, folder / "model.safetensors")

    for file in text.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    whole = {"model_type": "sees_too", "architectures": ["SeesToo"], "text_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def _compute(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        logits_BTV: torch.Tensor = model(input_ids=_IDS_BT, use_cache=False).logits
    return logits_BTV


@pytest.mark.parametrize("family", _PARTS)
@pytest.mark.parametrize("begins", ["model.language_model.", "language_model.model."])
def test_the_text_part_computes_as_the_text_model(begins: str, family: str, tmp_path: Path) -> None:
    """Names and settings are those of the text model, and what is left out is said."""
    text = make_checkpoint(tmp_path / "text", family, dtype="float32")
    part = Checkpoint(_let_it_see(text, tmp_path / "seeing", begins))

    assert torch.equal(_compute(load_model(part)), _compute(load_model(Checkpoint(text))))
    assert part.notes[0].startswith("2 tensors are left out")


@pytest.mark.parametrize("family", _PARTS)
def test_what_is_pruned_is_a_text_model(family: str, tmp_path: Path) -> None:
    """Transformers opens the folder that pruning leaves, without knowing the larger model."""
    text = make_checkpoint(tmp_path / "text", family, dtype="float32")
    part = Checkpoint(_let_it_see(text, tmp_path / "seeing", "model.language_model."))
    (tmp_path / "blocks").mkdir()

    pruned = assemble(part, tmp_path / "blocks", tmp_path / "pruned")
    theirs = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32).eval()
    wanted_BTV = _compute(load_model(part))
    torch.testing.assert_close(_compute(theirs), wanted_BTV, rtol=1e-4, atol=1e-5)
    assert torch.equal(_compute(load_model(Checkpoint(pruned))), wanted_BTV)


def test_a_head_for_further_tokens_is_left_out(tmp_path: Path) -> None:
    """Where llama.cpp has none; a plain text model that has one is read without it."""
    text = make_checkpoint(tmp_path / "text", "qwen3")
    tensors = load_file(text / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.ones(4, 4)}, text / "model.safetensors")

    checkpoint = Checkpoint(text)
    assert "mtp.fc.weight" not in checkpoint.entries
    assert "multi-token prediction" in checkpoint.notes[0]


def test_a_known_model_with_settings_for_text_is_no_part(tmp_path: Path) -> None:
    """Only where the model itself is unknown does its text part stand for it."""
    text = make_checkpoint(tmp_path / "text", "qwen3")
    edit_json(text / "config.json", text_config={"model_type": "gemma3_text"})
    assert Checkpoint(text).config["model_type"] == "qwen3"
