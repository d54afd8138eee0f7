"""Read an ONNX graph: its metadata, its tensors, and the zeros in their stored values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from racdeploy import quant as quants
from racdeploy.errors import ArtifactError
from racdeploy.exporting import MeasuredTensor
from racdeploy.packing.onnx.file import count_array_bytes, load_graph, read_array, read_properties
from racdeploy.packing.onnx.tensors import (
    MISMATCH_ERRORS,
    TENSORS_KEY,
    GraphTensor,
    StoredArrays,
    arrays_to_rows,
    read_tensors,
)


def measure(path: Path) -> tuple[dict[str, Any], list[MeasuredTensor]]:
    """Return scalar metadata and one row per tensor; an ArtifactError if the graph is damaged."""
    model = load_graph(path)
    properties = read_properties(model)
    stored = StoredArrays(model, path)
    rows = [_measure(tensor, stored, path) for tensor in read_tensors(properties, path)]
    rows += [_measure_other(tensor, path) for tensor in stored.unread.values()]

    opsets = []
    for opset in model.opset_import:
        domain = opset.domain or "ai.onnx"
        opsets.append(f"{domain} {opset.version}")

    names = [value.name for value in model.graph.input]
    inputs = [name for name in names if not name.startswith("past_")]

    scalars = {key: value for key, value in properties.items() if key != TENSORS_KEY}
    scalars["onnx.opsets"] = ", ".join(opsets)
    scalars["onnx.inputs"] = ", ".join(inputs)
    return scalars, rows


def _measure(tensor: GraphTensor, stored: StoredArrays, path: Path) -> MeasuredTensor:
    quant = quants.load(tensor.quant)
    I = tensor.shape[-1]
    O = math.prod(tensor.shape[:-1])

    arrays, size_bytes = stored.read(tensor)

    try:
        packed_OP = arrays_to_rows(tensor, arrays)
    except MISMATCH_ERRORS as error:
        raise ArtifactError(
            "arrays-do-not-fit",
            f"{path}: the arrays of {tensor.name!r} are missing or have wrong shapes: {error}",
        ) from error

    if packed_OP.shape != (O, I * quant.bits / 8):
        raise ArtifactError(
            "damaged-tensor-list",
            f"{path}: {tensor.name!r} has not the shape {list(tensor.shape)} in {tensor.quant}",
        )

    zeros = int(np.count_nonzero(quant.dequantize(packed_OP, I) == 0)) / (O * I)
    return MeasuredTensor(
        name=tensor.name,
        shape=tensor.shape,
        type=tensor.quant,
        zeros=zeros,
        size_bytes=size_bytes,
        packing=tensor.packing,
    )


def _measure_other(tensor: onnx.TensorProto, path: Path) -> MeasuredTensor:
    """Measure an initializer that an exporter or another program put into the graph."""
    values = read_array(tensor, path.parent)
    zeros = None
    if np.issubdtype(values.dtype, np.floating) and values.size:
        zeros = 1 - np.count_nonzero(values) / values.size
    kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    return MeasuredTensor(
        name=tensor.name,
        shape=tuple(tensor.dims),
        type=kind,
        zeros=zeros,
        size_bytes=count_array_bytes(tensor),
    )
