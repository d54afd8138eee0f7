"""Codes that pruning chose, beside the weights of a model folder; the exporter packs them.

``codes.safetensors`` holds them by tensor: ``WEIGHT|QUANT|FIELD``, in the row order of the model
and the column order of the exported file. Numbers of steps and minima are signed bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ArtifactError
from racdeploy.quant import load_grid
from racdeploy.quant.grid import Floats, GridCodes
from racdeploy.tensors.safetensors import TensorEntry, read_tensor_entries

CODES_FILE = "codes.safetensors"
_BYTES = ("step_code_OG", "minimum_code_OG")


@dataclass(frozen=True)
class StoredCodes:
    """Codes of one weight in a file, read when asked for."""

    quant: str
    fields: Mapping[str, TensorEntry]

    def read(self) -> GridCodes:
        """Return all rows."""
        values = {name: entry.read() for name, entry in self.fields.items()}
        for name in _BYTES:
            if name in values:
                values[name] = values[name].view(np.int8).astype(np.int16)
        return GridCodes(**values)


def name_arrays(weight: str, quant: str, codes: GridCodes) -> dict[str, NDArray[Any]]:
    """Return the arrays of a weight's codes by their names in the file."""
    arrays = {}
    for name, values in vars(codes).items():
        if values is not None:
            stored = values.astype(np.int8).view(np.uint8) if name in _BYTES else values
            arrays[f"{weight}|{quant}|{name}"] = stored
    return arrays


def list_stored_codes(folder: Path) -> dict[str, StoredCodes]:
    """Return the codes of a model folder by weight; none if it has no such file."""
    file = folder / CODES_FILE
    fields: dict[tuple[str, str], dict[str, TensorEntry]] = {}
    for name, entry in (read_tensor_entries(file) if file.is_file() else {}).items():
        weight, quant, field = name.split("|")
        fields.setdefault((weight, quant), {})[field] = entry
    return {weight: StoredCodes(quant, entries) for (weight, quant), entries in fields.items()}


def codes_of_other_weights(folder: Path, weight: str) -> ArtifactError:
    """Return the error for weights that were changed after their codes were chosen."""
    return ArtifactError(
        "codes-of-other-weights",
        f"{folder / CODES_FILE} holds the codes of other values of {weight!r}",
        remedy=f"remove {CODES_FILE}, and the export rounds the weights",
    )


def rescale(codes: GridCodes, quant: str, weight_OI: Floats) -> GridCodes:
    """Return codes with the scales of weights whose scales alone were trained, in file order."""
    grid = load_grid(quant)
    ones = np.ones_like(codes.scale_OX)
    zero_scale_OX = None
    ratio = np.float32(0)
    if codes.minimum_scale_OX is not None:
        ratio = np.float32(len(grid.values) // 2)
        zero_scale_OX = ones * ratio
    unit_OI = grid.decode(replace(codes, scale_OX=ones, minimum_scale_OX=zero_scale_OX))

    # Any weight of a block gives its scale; the largest one gives it exactly.
    unit_OXS = unit_OI.reshape(*codes.scale_OX.shape, grid.block_size)
    index_OX1 = np.abs(unit_OXS).argmax(axis=2, keepdims=True)
    unit_OX = np.take_along_axis(unit_OXS, index_OX1, 2)[:, :, 0]
    weight_OX = np.take_along_axis(weight_OI.reshape(unit_OXS.shape), index_OX1, 2)[:, :, 0]
    scale_OX = np.divide(weight_OX, unit_OX, out=codes.scale_OX.copy(), where=unit_OX != 0)

    scale_OX = scale_OX.astype(np.float16).astype(np.float32)
    minimum_scale_OX = None if codes.minimum_scale_OX is None else scale_OX * ratio
    return replace(codes, scale_OX=scale_OX, minimum_scale_OX=minimum_scale_OX)
