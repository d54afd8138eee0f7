"""Tensors of an ONNX graph that racdeploy wrote: their list in the metadata, and their arrays.

A linear in f32 or f16 is stored inputs first, as MatMul takes it; in a block format its codes have
three axes. The array in which zeros are counted, and which a packing packs, has the tensor's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from racdeploy import packing as packings
from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.errors import ArtifactError
from racdeploy.files.reading import Json, parse_json
from racdeploy.packing.block_layouts import Bytes
from racdeploy.packing.onnx.file import read_array
from racdeploy.packing.onnx.packer import PACKING_PREFIX, Arrays
from racdeploy.quant.matmulnbits import BLOCK_SIZE, MatMulNBitsBlocks

TENSORS_KEY = "racdeploy.tensors"
_KINDS = {"name": str, "shape": list, "quant": str, "is_embedding": bool, "packing": str}
_MAX_WEIGHTS = 1 << 40  # of a tensor
MISMATCH_ERRORS = (KeyError, ValueError, TypeError, IndexError)
"""Exceptions raised for arrays that are missing, or have a wrong type or shape."""


@dataclass(frozen=True)
class GraphTensor:
    """A tensor of a graph, which may be stored as several arrays."""

    name: str  # in the checkpoint and in the file
    shape: tuple[int, ...]  # as in the checkpoint, outputs first
    quant: str
    is_embedding: bool  # a Gather reads its rows, so they are not transposed
    packing: str = "plain"

    @property
    def is_matmulnbits(self) -> bool:
        return quants.is_matmulnbits(self.quant)

    @property
    def is_transposed(self) -> bool:
        """True if it is stored inputs first."""
        return len(self.shape) == 2 and not self.is_embedding and not self.is_matmulnbits


def read_tensors(properties: Mapping[str, str], path: Path) -> list[GraphTensor]:
    """Return the tensors that a graph lists; none if racdeploy did not write it."""
    listed = parse_json(properties.get(TENSORS_KEY, "[]"), f"{path}: its list of tensors")
    entries = listed if isinstance(listed, list) else [listed]

    tensors = []
    for entry in entries:
        tensor = _read_tensor(entry)
        if tensor is None:
            raise ArtifactError(
                "damaged-tensor-list",
                f"{path}: its list of tensors is damaged: it has {str(entry)[:200]!r}",
                remedy="export it again",
            )
        tensors.append(tensor)

    return tensors


def _read_tensor(entry: object) -> GraphTensor | None:
    """Return a tensor of the list, or None if the entry does not describe one."""
    values: Json = {}
    if isinstance(entry, dict):
        values = {"packing": "plain", **entry}
    if {key: type(value) for key, value in values.items()} != _KINDS:
        return None

    shape = values["shape"]
    quant = values["quant"]
    known = quant in plugins.list_names("quant") and "onnx" in quants.load(quant).formats
    known = known and values["packing"] in packings.list_supported("onnx", "packing")

    are_extents = all(type(extent) is int and extent >= 1 for extent in shape)
    if (
        not (known and are_extents)
        or len(shape) not in (1, 2, 3)
        or math.prod(shape) > _MAX_WEIGHTS
    ):
        return None
    return GraphTensor(**{**values, "shape": tuple(shape)})


def dump_tensors(tensors: list[GraphTensor]) -> str:
    """Return the metadata property that :func:`read_tensors` reads, as JSON."""
    listed = [vars(tensor).copy() for tensor in tensors]
    for values in listed:
        if values["packing"] == "plain":
            del values["packing"]
    return json.dumps(listed)


def rows_to_arrays(tensor: GraphTensor, packed_OP: Bytes) -> Arrays:
    """Return the arrays of packed rows, by their names in the file."""
    if tensor.is_matmulnbits:
        codec = quants.load_matmulnbits(tensor.quant)
        return blocks_to_arrays(tensor, codec.unpack(packed_OP, tensor.shape[1]))
    values = packed_OP.view("<f4" if tensor.quant == "f32" else "<f2").reshape(tensor.shape)
    return {tensor.name: np.ascontiguousarray(values.T) if tensor.is_transposed else values}


def blocks_to_arrays(tensor: GraphTensor, blocks: MatMulNBitsBlocks) -> Arrays:
    """Return the arrays of blocks as MatMulNBits takes them; codes of an embedding stay rows."""
    O, I = tensor.shape
    codes = blocks.code_OP
    if not tensor.is_embedding:
        codes = codes.reshape(O, I // BLOCK_SIZE, -1)

    arrays: Arrays = {
        tensor.name: np.ascontiguousarray(codes),
        f"{tensor.name}.scales": blocks.scale_OG.astype(np.float32),
    }
    if blocks.zero_OP is not None:
        arrays[f"{tensor.name}.zero_points"] = blocks.zero_OP
    return arrays


def arrays_to_rows(tensor: GraphTensor, arrays: Arrays) -> Bytes:
    """Return the packed rows of arrays: the inverse of :func:`rows_to_arrays`.

    Raises:
        MISMATCH_ERRORS: arrays are missing or do not fit each other.
    """
    main = arrays[tensor.name]
    if not tensor.is_matmulnbits:
        if tensor.is_transposed:
            main = main.T
        values = np.ascontiguousarray(main)
        return values.reshape(-1, values.shape[-1]).view(np.uint8)

    # The file has scales in float32, as the operator takes them; packed rows have float16.
    scale_OG = arrays[f"{tensor.name}.scales"]
    O, I = tensor.shape
    if main.dtype != np.uint8 or I % BLOCK_SIZE or scale_OG.shape != (O, I // BLOCK_SIZE):
        raise ValueError(f"codes of {main.dtype} and {scale_OG.shape} scales are not blocks")

    with np.errstate(over="ignore"):
        half_OG = scale_OG.astype("<f2")
    if not np.array_equal(half_OG.astype(np.float32), scale_OG, equal_nan=True):
        raise ValueError("a scale does not fit into half precision")

    parts = [main.reshape(len(main), -1), np.ascontiguousarray(half_OG).view(np.uint8)]
    zero_OP = arrays.get(f"{tensor.name}.zero_points")
    if zero_OP is not None:
        parts.append(zero_OP)

    return np.concatenate(parts, axis=1)


class StoredArrays:
    """Arrays of a graph, read tensor by tensor; ``unread`` has the initializers not read yet."""

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self.unread = {
            initializer.name: initializer
            for initializer in model.graph.initializer
            if not initializer.name.startswith(PACKING_PREFIX)
        }

        self._model = model
        self._path = path

    def read(self, tensor: GraphTensor) -> tuple[Arrays, int]:
        """Return the unpacked arrays of a tensor, and their bytes in the file."""
        packer = packings.load_onnx(tensor.packing).GraphPacker(self._model, self._path)
        names = [tensor.name + part for part in packer.ARRAY_SUFFIXES]
        stored = {name: self.unread.pop(name) for name in names if name in self.unread}

        try:
            arrays = {name: read_array(each, self._path.parent) for name, each in stored.items()}
            size_bytes = sum(values.nbytes for values in arrays.values())
            return packer.read(tensor, arrays), size_bytes
        except MISMATCH_ERRORS as error:
            raise ArtifactError(
                "arrays-do-not-fit",
                f"{self._path}: the arrays of {tensor.name!r} are missing or do not fit: {error}",
                remedy="copy or export it again",
            ) from error
