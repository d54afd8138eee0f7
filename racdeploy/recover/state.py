"""Tensors of a training on disk, written and read a piece at a time: no second copy in memory.

Where each process has some rows of every tensor, the first one writes and reads whole tensors, one
at a time. So a file does not depend on how many there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from racdeploy.files.writing import atomic_file
from racdeploy.prune.processes import ALONE, Processes
from racdeploy.tensors.safetensors import (
    DTYPES,
    TensorEntry,
    read_tensor_entries,
    write_header,
)

_TAGS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_VALUES = "__values__"
"""Name of a tensor that holds JSON text: what belongs to the tensors is in their file."""


def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
) -> None:
    """Write a safetensors file, whole or not at all; ``values`` goes with it as JSON.

    With ``processes`` all call this with their rows, and the first one writes.
    """
    described = {}
    rows = [len(each) for each in tensors.values()]
    counts = [sum(each) for each in zip(*processes.all(rows), strict=True)]

    for (name, each), count in zip(tensors.items(), counts, strict=True):
        described[name] = (_TAGS[each.dtype], (count, *each.shape[1:]))

    text = b""
    if values is not None:
        text = json.dumps(values).encode()
        text += b" " * (-len(text) % 4)
        described[_VALUES] = ("F32", (len(text) // 4,))

    if not processes.first:
        for each in tensors.values():
            processes.join(each)
        return

    with atomic_file(file) as target:
        write_header(target, described)
        for each in tensors.values():
            whole = processes.join(each).detach().cpu().contiguous()
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
def fill_tensors(file: Path, tensors: Mapping[str, Tensor], processes: Processes = ALONE) -> None:
    """Read the tensors of a file into those of the same names, shapes and types.

    With ``processes`` all call this with their rows, and the first one reads.
    """
    entries = read_tensor_entries(file) if processes.first else {}

    for name, target in tensors.items():
        whole = None
        if processes.first:
            whole = _read(entries[name])
            assert whole.shape[1:] == target.shape[1:], f"{file}: {name} has another shape"

        target.copy_(processes.part(whole, target))


def _read(entry: TensorEntry) -> Tensor:
    bits = np.fromfile(entry.file, DTYPES[entry.dtype], entry.size, offset=entry.start)
    values = torch.from_numpy(bits).view(entry.shape)
    return values.view(torch.bfloat16) if entry.dtype == "BF16" else values


def _bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the numbers as numpy holds them, which has no bfloat16."""
    flat = tensor.view(-1)
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.uint16)
    return flat.numpy()
