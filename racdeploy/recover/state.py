"""Tensors of a training on disk, written and read a piece at a time: no second copy in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from racdeploy.storage.files import atomic_file
from racdeploy.storage.safetensors import DTYPES, read_tensor_entries, write_header

_TAGS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_VALUES = "__values__"
"""Name of a tensor that holds JSON text: what belongs to the tensors is in their file."""


def write_tensors(
    file: Path, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; ``values`` goes with it as JSON."""
    described = {}
    for name, each in tensors.items():
        described[name] = (_TAGS[each.dtype], tuple(each.shape))

    text = b""
    if values is not None:
        text = json.dumps(values).encode()
        text += b" " * (-len(text) % 4)
        described[_VALUES] = ("F32", (len(text) // 4,))

    with atomic_file(file) as target:
        write_header(target, described)
        for each in tensors.values():
            whole = each.detach().cpu().contiguous()
            target.write(_bits(whole).data)
        target.write(text)


def read_values(file: Path) -> dict[str, Any]:
    """Return what was written with the tensors of a file."""
    entry = read_tensor_entries(file)[_VALUES]
    with file.open("rb") as source:
        source.seek(entry.start)
        values: dict[str, Any] = json.loads(source.read(entry.stop - entry.start))
    return values


@torch.no_grad()
def fill_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read the tensors of a file into those of the same names, shapes and types."""
    entries = read_tensor_entries(file)

    for name, target in tensors.items():
        entry = entries[name]
        assert entry.shape == tuple(target.shape), f"{file}: {name} has another shape"

        count = target.numel()
        bits = np.fromfile(file, DTYPES[entry.dtype], count, offset=entry.start)
        values = torch.from_numpy(bits).view(target.shape)
        if entry.dtype == "BF16":
            values = values.view(torch.bfloat16)

        target.copy_(values)


def _bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the numbers as numpy holds them, which has no bfloat16."""
    flat = tensor.view(-1)
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.uint16)
    return flat.numpy()
