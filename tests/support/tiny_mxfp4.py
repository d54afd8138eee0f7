"""Experts of a checkpoint in MXFP4, laid out as GPT-OSS is published."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

_FUSED = ("gate_up_proj", "down_proj")


def pack_experts(folder: Path) -> None:
    """Write codes and exponents in place of the fused matrices of a folder."""
    places: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(_FUSED)]:
            weight_EOI = tensors.pop(name).float().mT
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = _pack(weight_EOI)
        save_file(tensors, file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")


def _pack(weight_EOI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ggml's codes with neighbours in a byte, and its exponents but for every tenth.

    Those are one higher than they need be, with half the codes' values, as others choose them: that
    keeps what is even.
    """
    E, O, I = weight_EOI.shape
    packed = gguf.quantize(weight_EOI.numpy(), gguf.GGMLQuantizationType.MXFP4)
    packed_EOGP = packed.reshape(E, O, I // 32, 17)

    low, high = packed_EOGP[..., 1:] & 15, packed_EOGP[..., 1:] >> 4
    code = np.concatenate([low, high], -1)
    exponent = packed_EOGP[..., 0].copy()

    halved = np.array([0, 0, 1, 1, 2, 3, 4, 5], np.uint8)
    tenth = exponent[:, ::10]
    tenth += 1
    own = code[:, ::10]
    own[:] = halved[own & 7] | own & 8

    blocks = code[..., 0::2] | code[..., 1::2] << 4
    return torch.from_numpy(blocks), torch.from_numpy(exponent)
