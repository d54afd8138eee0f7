"""The tensors of an ONNX graph that racdeploy wrote: what it says of them, and the arrays of each.

A linear in f32 or f16 is stored inputs first, as MatMul takes it, in a block format with three
axes. The array that zeros are counted in, and that a packing packs, has the tensor's own name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from racdeploy import packing as packings
from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.errors import ArtifactError
from racdeploy.files.reading import parse_json
from racdeploy.packing.onnx.file import read_array
from racdeploy.packing.onnx.packer import PACKING_PREFIX, Arrays, Packer
from racdeploy.quant.matmulnbits import BLOCK, Blocks

TENSORS_KEY = "racdeploy.tensors"
_KINDS = {"name": str, "shape": list, "quant": str, "looked_up": bool, "packing": str}
_MOST_WEIGHTS = 1 << 40  # of a tensor
UNFIT = (KeyError, ValueError, TypeError, IndexError)
"""What comes of arrays that are missing, or have another type or other axes than they should."""


@dataclass(frozen=True)
class GraphTensor:
    """One tensor of a graph."""

    name: str  # in the checkpoint and in the file
    shape: tuple[int, ...]  # as in the checkpoint, outputs first
    quant: str
    looked_up: bool  # whether a Gather reads it, so that rows stay together
    packing: str = "plain"

    @property
    def is_blocks(self) -> bool:
        return quants.is_blocks(self.quant)

    @property
    def turned(self) -> bool:
        """Whether it is stored inputs first."""
        return len(self.shape) == 2 and not self.looked_up and not self.is_blocks


def read_tensors(properties: Mapping[str, str], path: Path) -> list[GraphTensor]:
    """Return what a graph says of its tensors; nothing where racdeploy did not write it."""
    listed = parse_json(properties.get(TENSORS_KEY, "[]"), f"{path}: its list of tensors")
    entries = listed if isinstance(listed, list) else [listed]
    tensors = [_read_tensor(entry) for entry in entries]

    for entry, tensor in zip(entries, tensors, strict=True):
        if tensor is None:
            message = f"{path}: its list of tensors is damaged: it has {str(entry)[:200]!r}"
            raise ArtifactError("damaged-tensor-list", message, remedy="export it again")

    return [tensor for tensor in tensors if tensor is not None]


def _read_tensor(entry: object) -> GraphTensor | None:
    """Return a tensor of the list; None where the entry does not describe one."""
    values: dict[str, Any] = {}
    if isinstance(entry, dict):
        values = {"packing": "plain", **entry}
    if {key: type(value) for key, value in values.items()} != _KINDS:
        return None

    shape = values["shape"]
    quant = values["quant"]
    known = quant in plugins.names("quant") and "onnx" in quants.load(quant).FORMATS
    known = known and values["packing"] in packings.names("onnx")

    are_extents = all(type(extent) is int and extent >= 1 for extent in shape)
    if not known or not are_extents:
        return None
    if len(shape) not in (1, 2) or math.prod(shape) > _MOST_WEIGHTS:
        return None
    return GraphTensor(**{**values, "shape": tuple(shape)})


def list_tensors(tensors: list[GraphTensor]) -> str:
    """Return the property under :data:`TENSORS_KEY` that :func:`read_tensors` reads."""
    listed = [vars(tensor).copy() for tensor in tensors]
    for values in listed:
        if values["packing"] == "plain":
            del values["packing"]
    return json.dumps(listed)


def split_arrays(tensor: GraphTensor, packed_OP: NDArray[np.uint8]) -> Arrays:
    """Return the arrays of packed rows, by their name in the file."""
    if tensor.is_blocks:
        quant = quants.load_blocks(tensor.quant)
        return split_blocks(tensor, quant.blocks(packed_OP, tensor.shape[1]))
    values = packed_OP.view("<f4" if tensor.quant == "f32" else "<f2").reshape(tensor.shape)
    return {tensor.name: np.ascontiguousarray(values.T) if tensor.turned else values}


def split_blocks(tensor: GraphTensor, blocks: Blocks) -> Arrays:
    """Return the arrays of blocks as MatMulNBits takes them, or a lookup."""
    O, I = tensor.shape
    codes = blocks.code_OP
    if not tensor.looked_up:
        codes = codes.reshape(O, I // BLOCK, -1)

    arrays: Arrays = {
        tensor.name: np.ascontiguousarray(codes),
        f"{tensor.name}.scales": blocks.scale_OG.astype(np.float32),
    }
    if blocks.zero_OP is not None:
        arrays[f"{tensor.name}.zero_points"] = blocks.zero_OP
    return arrays


def join_arrays(tensor: GraphTensor, arrays: Arrays) -> NDArray[np.uint8]:
    """Return the packed rows of arrays: the way back of :func:`split_arrays`.

    Arrays that are missing or do not fit each other are one of :data:`UNFIT`.
    """
    main = arrays[tensor.name]
    if not tensor.is_blocks:
        if tensor.turned:
            main = main.T
        values = np.ascontiguousarray(main)
        rows = 1 if values.ndim == 1 else len(values)
        return values.reshape(rows, -1).view(np.uint8)

    # The file has scales in float32, which the operator takes; the rows in half precision.
    scale_OG = arrays[f"{tensor.name}.scales"]
    O, I = tensor.shape
    if main.dtype != np.uint8 or I % BLOCK or scale_OG.shape != (O, I // BLOCK):
        raise ValueError(f"codes of {main.dtype} and {scale_OG.shape} scales are no blocks")

    with np.errstate(over="ignore"):
        half_OG = scale_OG.astype("<f2")
    if not np.array_equal(half_OG.astype(np.float32), scale_OG, equal_nan=True):
        raise ValueError("a scale is no number of half precision")

    parts = [main.reshape(len(main), -1), np.ascontiguousarray(half_OG).view(np.uint8)]
    zero_OP = arrays.get(f"{tensor.name}.zero_points")
    if zero_OP is not None:
        parts.append(zero_OP)

    return np.concatenate(parts, axis=1)


class StoredArrays:
    """The arrays of a graph, tensor by tensor; ``left`` are those that nobody asked for."""

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self.left = {
            initializer.name: initializer
            for initializer in model.graph.initializer
            if not initializer.name.startswith(PACKING_PREFIX)
        }

        self._model = model
        self._path = path
        self._packers: dict[str, Packer] = {}

    def take(self, tensor: GraphTensor) -> tuple[Arrays, int]:
        """Return the arrays of a tensor, unpacked, and the bytes that they take in the file."""
        packer = self._packer(tensor.packing)
        names = [tensor.name + part for part in packer.PARTS]
        stored = {name: self.left.pop(name) for name in names if name in self.left}

        try:
            return packer.read(tensor, stored)
        except UNFIT as error:
            raise ArtifactError(
                "arrays-do-not-fit",
                f"{self._path}: the arrays of {tensor.name!r} are missing or do not fit: {error}",
                remedy="copy or export it again",
            ) from error

    def constants(self, tensors: list[GraphTensor]) -> list[tuple[str, NDArray[Any]]]:
        """Return name and values of what is left and belongs to none of these tensors."""
        named = {
            tensor.name + part for tensor in tensors for part in self._packer(tensor.packing).PARTS
        }
        return [
            (name, read_array(initializer, self._path.parent))
            for name, initializer in self.left.items()
            if name not in named
        ]

    def _packer(self, packing: str) -> Packer:
        if packing not in self._packers:
            kind = packings.load_onnx(packing).GraphPacker
            self._packers[packing] = kind(self._model, self._path)
        return self._packers[packing]
