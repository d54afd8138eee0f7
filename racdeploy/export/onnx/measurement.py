"""Read an exported ONNX graph back: its tensors, and the zeros in the stored bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from racdeploy import quant as quants
from racdeploy.errors import ArtifactError
from racdeploy.packing.onnx.file import array_bytes, load_graph, read_array
from racdeploy.packing.onnx.tensors import (
    TENSORS_KEY,
    GraphTensor,
    StoredArrays,
    join_arrays,
    read_tensors,
)


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


def _row(tensor: GraphTensor, stored: StoredArrays, path: Path) -> dict[str, Any]:
    quant = quants.load(tensor.quant)
    O, I = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
    arrays, size_bytes = stored.take(tensor)
    try:
        packed_OP = join_arrays(tensor, arrays)
    except (KeyError, ValueError) as error:
        raise ArtifactError(
            f"{path}: the arrays of {tensor.name!r} are missing or of other shapes: {error}"
        ) from error
    if packed_OP.shape != (O, I * quant.BITS / 8):
        raise ArtifactError(
            f"{path}: {tensor.name!r} is not of shape {list(tensor.shape)} in {tensor.quant}"
        )
    zeros = O * I - int(np.count_nonzero(quant.dequantize(packed_OP, I)))
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "type": tensor.quant,
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
