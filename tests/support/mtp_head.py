"""A random head that predicts further tokens, beside a tiny model as Qwen3.5 is published with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import edit_json


def add_further_head(folder: Path, like: int, seed: int = 0) -> Path:
    """Write a head of one block into a folder; ``like`` is a block of the model that attends."""
    prefix = f"model.layers.{like}."
    own = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        own |= {name: value for name, value in tensors.items() if name.startswith(prefix)}

    generator = torch.Generator().manual_seed(seed)
    width = own[f"{prefix}input_layernorm.weight"].shape[0]
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    shapes = {f"mtp.{name}.weight": (width,) for name in norms}
    shapes["mtp.fc.weight"] = (width, 2 * width)
    for name, value in own.items():
        shapes[f"mtp.layers.0.{name.removeprefix(prefix)}"] = tuple(value.shape)

    dtype = own[f"{prefix}input_layernorm.weight"].dtype
    for name, shape in shapes.items():
        tensors[name] = (torch.randn(shape, generator=generator) * 0.1).to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map=weight_map | dict.fromkeys(shapes, file.name))
    edit_json(folder / "config.json", mtp_num_hidden_layers=1)
    return folder
