"""The second graph of packing ``bitmask_op``: linears as racdeploy's operator reads them, on packed initializers.

Made from the finished plain graph, whose nodes it copies but for the products of packed linears. Its weights lie in
``NAME.accel.onnx_data`` whatever their size, since onnxruntime maps that file and the operator reads it in place.
What is written is read back and compared with the plain rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from racdeploy import quant as quants
from racdeploy.accel import ACCEL_KEY, Packed, accel_name
from racdeploy.errors import EngineError
from racdeploy.export import ExportedTensor
from racdeploy.export.onnx.file import load_graph, read_array, write_model
from racdeploy.export.onnx.measurement import TENSORS_KEY, StoredArrays, read_tensors
from racdeploy.export.onnx.packing import MATRIX_PARTS, OPERATOR_DOMAIN
from racdeploy.export.onnx.weights import PREFIX, PlannedTensor, rows_of
from racdeploy.packing.packers import bitmask_op
from racdeploy.packing.sparse_matrix import LAYOUT, kind_of, split

_OPERATOR = "SparseMatMul"
_PRODUCTS = ("MatMul", "MatMulNBits")
_BLOCK = 32


def refusals(plan: Sequence[PlannedTensor], tensors: Sequence[ExportedTensor]) -> dict[str, str]:
    """Return why each tensor stays plain in the second graph, or an empty string, by its name."""
    return {
        planned.name: _refusal(planned, tensor.zeros)
        for planned, tensor in zip(plan, tensors, strict=True)
    }


def _refusal(tensor: PlannedTensor, zeros: float) -> str:
    if tensor.looked_up:
        return "a lookup reads single rows of it"
    if len(tensor.shape) == 1:
        return "the operator takes matrices"
    if tensor.shape[1] % _BLOCK:
        return f"rows of {tensor.shape[1]} weights are no multiple of {_BLOCK}"
    return bitmask_op.fits(quants.load(tensor.quant_real), zeros)


def write_accel(plain: Path, reasons: Mapping[str, str], zeros: Mapping[str, float]) -> str:
    """Write the second graph beside a plain one, whose weights it has.

    Args:
        plain: a graph that was just written.
        reasons: why a tensor stays plain, or an empty string, by its name.
        zeros: fraction of zeros of each tensor.

    Returns:
        What it is, in a sentence; it is not written where no tensor is packed.

    Raises:
        EngineError: what was written is not what was to be written.
    """
    model = load_graph(plain)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    before = read_tensors(properties, plain)
    tensors = [
        replace(tensor, packing="plain" if reasons[tensor.name] else "bitmask_op")
        for tensor in before
    ]
    packed = {tensor.name: tensor for tensor in tensors if tensor.packing != "plain"}
    if not packed:
        return f"no tensor is sparse enough for {accel_name(plain.name)}"
    stored = StoredArrays(model, plain)
    named = {name for tensor in tensors for name in stored.names(tensor)}
    constants = [
        (key, read_array(value, plain.parent))
        for key, value in stored.left.items()
        if key not in named
    ]
    _rewire(model, packed)
    pairs = zip(before, tensors, strict=True)
    arrays = (item for old, tensor in pairs for item in _arrays(tensor, stored.take(old)[0]))
    properties[TENSORS_KEY] = json.dumps([tensor.to_json() for tensor in tensors])
    properties[ACCEL_KEY] = json.dumps(_summary(packed, zeros))
    name = accel_name(plain.name)
    write_model(
        model, chain(constants, arrays), plain.parent, name, lambda: properties, inline_bytes=0
    )
    _compare(plain, plain.with_name(name), packed)
    size_bytes = sum(
        file.stat().st_size for file in plain.parent.iterdir() if file.name.startswith(name)
    )
    return (
        f"{name} ({size_bytes / 1e6:,.1f} MB) has the same weights for racdeploy's operator, which multiplies "
        f"{len(packed)} tensors as they are packed"
    )


def _arrays(
    tensor: PlannedTensor, arrays: dict[str, NDArray[Any]]
) -> Iterator[tuple[str, NDArray[Any]]]:
    kind = kind_of(quants.load(tensor.quant_real))
    if tensor.packing == "plain" or kind is None:
        yield from arrays.items()
        return
    matrix = split(kind, rows_of(tensor, arrays))
    parts = matrix.heads_OP, matrix.values, matrix.offsets
    yield from zip((tensor.name + part for part in MATRIX_PARTS), parts, strict=True)


def _rewire(model: onnx.ModelProto, packed: Mapping[str, PlannedTensor]) -> None:
    """Replace the products of packed tensors, and drop what only they read."""
    widened = {f"{name}{part}": name for name in packed for part in ("", ".f32")}
    nodes = []
    for node in model.graph.node:
        if node.op_type in _PRODUCTS and node.input[1] in widened:
            nodes.append(_product(node, packed[widened[node.input[1]]]))
        else:
            nodes.append(node)
    read = {name for node in nodes for name in node.input} | {
        value.name for value in model.graph.output
    }
    ours = [
        node for node in nodes if not node.name.startswith(PREFIX) or read.intersection(node.output)
    ]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(ours)
    model.opset_import.append(helper.make_opsetid(OPERATOR_DOMAIN, LAYOUT))


def _product(node: onnx.NodeProto, tensor: PlannedTensor) -> onnx.NodeProto:
    kind = kind_of(quants.load(tensor.quant_real))
    assert kind is not None
    O, I = tensor.shape
    inputs = [node.input[0], *(tensor.name + part for part in MATRIX_PARTS)]
    attributes = {"I": I, "O": O, "quant": kind.ggml_type}
    return helper.make_node(
        _OPERATOR, inputs, list(node.output), node.name, domain=OPERATOR_DOMAIN, **attributes
    )


def _summary(packed: Mapping[str, PlannedTensor], zeros: Mapping[str, float]) -> list[Packed]:
    """Return for each number format how many weights are packed, and the fraction of zeros among them."""
    weights: dict[int, int] = {}
    zero_counts: dict[int, float] = {}
    for name, tensor in packed.items():
        kind, count = kind_of(quants.load(tensor.quant_real)), int(np.prod(tensor.shape))
        assert kind is not None
        weights[kind.ggml_type] = weights.get(kind.ggml_type, 0) + count
        zero_counts[kind.ggml_type] = zero_counts.get(kind.ggml_type, 0.0) + count * zeros[name]
    return [
        {"quant": quant, "weights": count, "zeros": zero_counts[quant] / count}
        for quant, count in weights.items()
    ]


def _compare(plain: Path, accel: Path, packed: Mapping[str, PlannedTensor]) -> None:
    """Read the packed tensors back from the disk and hold them against the plain ones."""
    before, after = (StoredArrays(load_graph(file), file) for file in (plain, accel))
    for tensor in packed.values():
        expected_OP = rows_of(tensor, before.take(replace(tensor, packing="plain"))[0])
        if not np.array_equal(expected_OP, rows_of(tensor, after.take(tensor)[0])):
            raise EngineError(
                f"{accel} does not hold the weights of {tensor.name!r}",
                remedy="check disk and memory",
            )
