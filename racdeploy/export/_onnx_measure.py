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
from racdeploy.export._onnx_file import array_bytes, load_graph, read_array
from racdeploy.export._onnx_weights import PlannedTensor, rows_of

__all__ = ["TENSORS_KEY", "measure", "read_tensors"]

TENSORS_KEY = "racdeploy.tensors"
_PARTS = (".scales", ".zero_points")


def measure(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return scalar metadata and one row per tensor; see :class:`racdeploy.export.Format`.

    Raises:
        ArtifactError: the file is damaged, or its weights are missing or elsewhere.
    """
    model = load_graph(path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    rows = []
    for tensor in read_tensors(properties, path):
        arrays = {
            name: read_array(initializers.pop(name), path.parent)
            for name in (tensor.name, *(tensor.name + part for part in _PARTS))
            if name in initializers
        }
        rows.append(_row(tensor, arrays, path))
    rows += [_foreign_row(tensor, path) for tensor in initializers.values()]
    scalars = {key: value for key, value in properties.items() if key != TENSORS_KEY}
    inputs = ", ".join(value.name for value in model.graph.input if not value.name.startswith("past_key_values."))
    opsets = ", ".join(f"{opset.domain or 'ai.onnx'} {opset.version}" for opset in model.opset_import)
    return scalars | {"onnx.opsets": opsets, "onnx.inputs": inputs}, rows


def read_tensors(properties: dict[str, str], path: Path) -> list[PlannedTensor]:
    """Return what a graph says of its tensors; a graph that racdeploy did not write says nothing.

    Raises:
        ArtifactError: what it says is damaged.
    """
    try:
        return [_planned(**values) for values in json.loads(properties.get(TENSORS_KEY, "[]"))]
    except (json.JSONDecodeError, RecursionError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: its list of tensors is damaged: {error}", remedy="export it again") from error


def _planned(name: str, shape: list[int], quant: str, looked_up: bool) -> PlannedTensor:
    known = quant in plugins.names("quant") and "onnx" in quants.load(quant).FORMATS
    if not known or len(shape) not in (1, 2) or any(extent < 1 for extent in shape):
        raise ValueError(f"{name!r} is of quant {quant!r} and shape {shape}")
    return PlannedTensor(name, tuple(shape), quant, quant, "", looked_up)


def _row(tensor: PlannedTensor, arrays: dict[str, NDArray[Any]], path: Path) -> dict[str, Any]:
    quant = quants.load(tensor.quant_real)
    O, I = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
    try:
        packed_OP = rows_of(tensor, arrays)
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: the arrays of {tensor.name!r} are missing or of other shapes: {error}") from error
    if packed_OP.shape != (O, I * quant.BITS / 8):
        raise ArtifactError(f"{path}: {tensor.name!r} is not of shape {list(tensor.shape)} in {tensor.quant_real}")
    zeros = O * I - int(np.count_nonzero(quant.dequantize(packed_OP, I)))
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "type": tensor.quant_real,
        "zeros": zeros / (O * I),
        "size_bytes": sum(values.nbytes for values in arrays.values()),
        "packing": "plain",
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
