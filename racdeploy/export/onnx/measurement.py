"""Read an exported ONNX graph back: its tensors, and the zeros in the stored bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.errors import ArtifactError
from racdeploy.export.onnx.file import array_bytes, load_graph, read_array
from racdeploy.export.onnx.packing import OPERATOR_DOMAIN, UNPACK, joined_codes, matrix_rows
from racdeploy.export.onnx.weights import PlannedTensor, arrays_of, rows_of
from racdeploy.packing import raconnx
from racdeploy.packing.sparse_matrix import LAYOUT

TENSORS_KEY = "racdeploy.tensors"
_PARTS = (".scales", ".zero_points", ".mask", ".values", ".heads", ".offsets")


def measure(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return scalar metadata and one row per tensor; see :class:`racdeploy.export.Format`.

    Raises:
        ArtifactError: the file is damaged, or its weights are missing or elsewhere.
    """
    model = load_graph(path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    stored = StoredArrays(model, path)
    rows = [_row(tensor, stored, path) for tensor in read_tensors(properties, path)]
    rows += [_foreign_row(tensor, path) for tensor in stored.left.values()]
    scalars = {key: value for key, value in properties.items() if key != TENSORS_KEY}
    inputs = ", ".join(
        value.name for value in model.graph.input if not value.name.startswith("past_key_values.")
    )
    opsets = ", ".join(
        f"{opset.domain or 'ai.onnx'} {opset.version}" for opset in model.opset_import
    )
    return scalars | {"onnx.opsets": opsets, "onnx.inputs": inputs}, rows


class StoredArrays:
    """The arrays of a graph, tensor by tensor; ``left`` are the initializers that nobody asked for.

    Args:
        model: the graph.
        path: its file.

    Raises:
        ArtifactError: another racdeploy packed its matrices, in another form.
    """

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        for opset in model.opset_import:
            if opset.domain == OPERATOR_DOMAIN and opset.version != LAYOUT:
                raise ArtifactError(
                    f"{path} packs its matrices in form {opset.version}; known is {LAYOUT}",
                    remedy="export it again, or use the racdeploy that made it",
                )
        self.left = {t.name: t for t in model.graph.initializer if not t.name.startswith(UNPACK)}
        self._path = path
        packed = any(map(_is_packed, model.graph.initializer))
        self._sidecar = raconnx.Sidecar.open(path) if packed else None

    def take(self, tensor: PlannedTensor) -> tuple[dict[str, NDArray[Any]], int]:
        """Return the arrays of a tensor, unpacked, and the bytes that they take in the file.

        Raises:
            ArtifactError: one of them is missing, damaged or of another shape.
        """
        try:
            read = [
                self._read(self.left.pop(name)) for name in self.names(tensor) if name in self.left
            ]
            arrays = {name: values for name, values, _ in read}
            size_bytes = sum(stored_bytes for *_, stored_bytes in read)
            if tensor.packing == "bitmask_op":
                arrays = arrays_of(tensor, matrix_rows(tensor, arrays))
            elif tensor.packing == "bitmask_graph":
                arrays = {tensor.name: joined_codes(tensor, arrays)} | arrays
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"{self._path}: the arrays of {tensor.name!r} are missing or do not fit: {error}",
                remedy="copy or export it again",
            ) from error
        return arrays, size_bytes

    def _read(self, tensor: onnx.TensorProto) -> tuple[str, NDArray[Any], int]:
        """Return name and values of an initializer, and the bytes that it takes in its file."""
        if self._sidecar and _is_packed(tensor):
            return (
                tensor.name,
                self._sidecar.read(tensor.name),
                self._sidecar.header[tensor.name]["size_bytes"],
            )
        values = read_array(tensor, self._path.parent)
        return tensor.name, values, values.nbytes

    def names(self, tensor: PlannedTensor) -> list[str]:
        """Return what the arrays of a tensor may be called."""
        return [tensor.name + part for part in ("", *_PARTS)]


def _is_packed(tensor: onnx.TensorProto) -> bool:
    return any(entry.value == raconnx.PLACE for entry in tensor.external_data)


def read_tensors(properties: dict[str, str], path: Path) -> list[PlannedTensor]:
    """Return what a graph says of its tensors; a graph that racdeploy did not write says nothing.

    Raises:
        ArtifactError: what it says is damaged.
    """
    try:
        return [_planned(**values) for values in json.loads(properties.get(TENSORS_KEY, "[]"))]
    except (json.JSONDecodeError, RecursionError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: its list of tensors is damaged: {error}", remedy="export it again"
        ) from error


def _planned(
    name: str, shape: list[int], quant: str, looked_up: bool, packing: str = "plain"
) -> PlannedTensor:
    known = quant in plugins.names("quant") and "onnx" in quants.load(quant).FORMATS
    known = known and packing in plugins.names("packing")
    if not known or len(shape) not in (1, 2) or any(extent < 1 for extent in shape):
        raise ValueError(f"{name!r} is of quant {quant!r} and shape {shape}")
    return PlannedTensor(name, tuple(shape), quant, quant, "", looked_up, packing)


def _row(tensor: PlannedTensor, stored: StoredArrays, path: Path) -> dict[str, Any]:
    quant = quants.load(tensor.quant_real)
    O, I = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
    arrays, size_bytes = stored.take(tensor)
    try:
        packed_OP = rows_of(tensor, arrays)
    except (KeyError, ValueError) as error:
        raise ArtifactError(
            f"{path}: the arrays of {tensor.name!r} are missing or of other shapes: {error}"
        ) from error
    if packed_OP.shape != (O, I * quant.BITS / 8):
        raise ArtifactError(
            f"{path}: {tensor.name!r} is not of shape {list(tensor.shape)} in {tensor.quant_real}"
        )
    zeros = O * I - int(np.count_nonzero(quant.dequantize(packed_OP, I)))
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "type": tensor.quant_real,
        "zeros": zeros / (O * I),
        "size_bytes": size_bytes,
        "packing": tensor.packing,
    }


def _foreign_row(tensor: onnx.TensorProto, path: Path) -> dict[str, Any]:
    values = read_array(tensor, path.parent)
    counts = np.issubdtype(values.dtype, np.floating) and values.size
    return {
        "name": tensor.name,
        "shape": list(tensor.dims),
        "type": onnx.TensorProto.DataType.Name(tensor.data_type).lower(),
        "zeros": 1 - np.count_nonzero(values) / values.size if counts else None,
        "size_bytes": array_bytes(tensor),
        "packing": "plain",
    }
