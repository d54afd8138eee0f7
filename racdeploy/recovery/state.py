"""Training state on disk, written and read a tensor at a time, without a second copy in memory.

Where each process has some rows of every tensor, the first one writes and reads whole tensors. So a
file does not depend on the number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from racdeploy.files.reading import Json
from racdeploy.files.writing import atomic_file
from racdeploy.pruning.job_share import WHOLE_SHARE, JobShare
from racdeploy.tensors.safetensors import (
    DTYPES,
    TensorEntry,
    read_tensor_entries,
    write_header,
)

_TAGS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_VALUES = "__values__"
"""Name of a tensor that holds JSON text, so that values and tensors are replaced together."""


def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any] | None = None,
    share: JobShare = WHOLE_SHARE,
) -> None:
    """Write a safetensors file atomically; ``values`` are stored in it as JSON.

    Several processes all call this, each with its rows, and the one that has the files writes.
    """
    described = {}
    rows = [len(each) for each in tensors.values()]
    counts = [sum(each) for each in zip(*share.list_all(rows), strict=True)]

    for (name, each), count in zip(tensors.items(), counts, strict=True):
        described[name] = (_TAGS[each.dtype], (count, *each.shape[1:]))

    text = b""
    if values is not None:
        text = json.dumps(values).encode()
        text += b" " * (-len(text) % 4)  # whole float32 numbers
        described[_VALUES] = ("F32", (len(text) // 4,))

    if not share.has_files:
        for each in tensors.values():
            share.gather_rows(each)
        return

    with atomic_file(file) as target:
        write_header(target, described)
        for each in tensors.values():
            whole = share.gather_rows(each).detach().cpu().contiguous()

            # Bfloat16 is written as uint16, since numpy lacks it.
            flat = whole.view(-1)
            if flat.dtype == torch.bfloat16:
                flat = flat.view(torch.uint16)
            target.write(flat.numpy().data)
        target.write(text)


def read_values(file: Path) -> Json:
    """Return the ``values`` of a file of :func:`write_tensors`."""
    entry = read_tensor_entries(file)[_VALUES]
    with file.open("rb") as source:
        source.seek(entry.start)
        values: Json = json.loads(source.read(entry.stop - entry.start))
    return values


@torch.no_grad()
def fill_tensors(file: Path, tensors: Mapping[str, Tensor], share: JobShare = WHOLE_SHARE) -> None:
    """Copy the tensors of a file into ``tensors`` of the same names, shapes and dtypes.

    Several processes all call this, each with its rows, and the one that has the files reads.
    """
    entries = read_tensor_entries(file) if share.has_files else {}

    for name, target in tensors.items():
        whole = None
        if share.has_files:
            whole = _read(entries[name])
            assert whole.shape[1:] == target.shape[1:], f"{file}: {name} has another shape"

        target.copy_(share.scatter_rows(whole, target))


def _read(entry: TensorEntry) -> Tensor:
    bits = np.fromfile(entry.file, DTYPES[entry.dtype], entry.size, offset=entry.start)
    values = torch.from_numpy(bits).view(entry.shape)
    return values.view(torch.bfloat16) if entry.dtype == "BF16" else values
