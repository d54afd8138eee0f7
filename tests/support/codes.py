"""Codes of number formats for tests: drawn at random, and what files hold of stored ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from racdeploy import quant as quants
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.quant.grid import GridCodes
from racdeploy.quant.stored_codes import CodedWeight, join_codes, name_arrays
from racdeploy.tensors.safetensors import read_tensor_entries

Weights = NDArray[np.float32]


def draw_codes(name: str, O: int, I: int, seed: int = 0) -> GridCodes:
    """Return codes, scales, step codes and minima over the whole range of a format."""
    random, grid = np.random.default_rng(seed), quants.load_grid(name)
    blocks, groups = I // grid.block_size, I // grid.group_size

    def draw_scales() -> Weights:
        if grid.scale == "power_of_two":
            return np.exp2(random.integers(-30, 3, (O, blocks))).astype(np.float32)
        return (0.01 * random.normal(size=(O, blocks))).astype(np.float16).astype(np.float32)

    def draw_numbers(ends: tuple[int, int] | None) -> NDArray[np.int16] | None:
        return ends and random.integers(ends[0], ends[1] + 1, (O, groups)).astype(np.int16)

    code_OI = random.integers(0, len(grid.values), (O, I)).astype(np.uint8)
    scale_OX = draw_scales()
    minimum_scale_OX = None
    if grid.minimum_codes:
        minimum_scale_OX = draw_scales() if grid.step_codes else scale_OX
    step_code_OG, minimum_code_OG = map(draw_numbers, (grid.step_codes, grid.minimum_codes))
    return GridCodes(code_OI, scale_OX, step_code_OG, minimum_code_OG, minimum_scale_OX)


def store_codes(folder: Path, name: str, quant: str, codes: GridCodes) -> dict[str, CodedWeight]:
    """Write the codes of a weight into a file; return what is read from there."""
    file = folder / "codes.safetensors"
    save_file(name_arrays(name, quant, codes, quants.load_grid(quant).decode(codes)), file)
    stored = join_codes(read_tensor_entries(file))[name]
    assert isinstance(stored, CodedWeight)
    return {name: stored}


def read_as_file(name: str, codes: GridCodes) -> Weights:
    """Return the weights that a file holds, read by the engine's own dequantizer."""
    packed_OP = quants.load_grid(name).pack(codes)
    return np.array(quants.load(name).dequantize(packed_OP, codes.code_OI.shape[1]))


def read_stored_weights(folder: Path) -> dict[str, Weights]:
    """Return what an exported file will hold of a model folder's codes, by weight."""
    coded = Checkpoint(folder).coded
    return {name: read_as_file(each.quant, each.read_codes()) for name, each in coded.items()}
