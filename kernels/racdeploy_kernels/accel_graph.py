"""Write and read the accelerated graph of packing ``bitmask_op``.

It is made from the finished plain graph; only the products of packed linears differ. Its weights
are always in ``NAME.accel.onnx_data``, since onnxruntime maps that file and the
operator reads it in place. Written weights are read back and compared with the plain ones.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from racdeploy.errors import ArtifactError, EngineError
from racdeploy.packing.onnx.file import load_graph, read_array, read_properties, write_model
from racdeploy.packing.onnx.packer import NODE_PREFIX, Arrays, BaseGraphPacker
from racdeploy.packing.onnx.tensors import (
    TENSORS_KEY,
    GraphTensor,
    StoredArrays,
    arrays_to_rows,
    dump_tensors,
    read_tensors,
)
from racdeploy.sparse_kernels import accel_name
from racdeploy_kernels.sparse_matrix import (
    ACCEL_KEY,
    KERNEL_FORMATS,
    LAYOUT_VERSION,
    OPERATOR_DOMAIN,
    PackedWeights,
    SparseMatrix,
    from_sparse,
    to_sparse,
)

_OPERATOR = "SparseMatMul"
_PRODUCTS = ("MatMul", "MatMulNBits")
_PARTS = (".heads", ".values", ".offsets")
_FORMS = [("uint8", 2), ("uint8", 1), ("int64", 1)]
"""Type and number of dimensions of these arrays."""


def write_accel_graph(plain: Path, packing: str, zeros: Mapping[str, float]) -> str:
    """Write the accelerated graph beside a plain one if a tensor is packed; return a note on it.

    Args:
        packing: name of the plugin that reads it.
        zeros: tensor to pack → its fraction of zeros, 0 to 1.
    """
    name = accel_name(plain.name)
    if not zeros:
        return f"no tensor is sparse enough for {name}"

    model = load_graph(plain)
    properties = read_properties(model)
    before = read_tensors(properties, plain)

    packed = {t.name: replace(t, packing=packing) for t in before if t.name in zeros}
    after = [packed.get(tensor.name, tensor) for tensor in before]
    properties[TENSORS_KEY] = dump_tensors(after)
    properties[ACCEL_KEY] = json.dumps(_summarize(packed, zeros))

    stored = StoredArrays(model, plain)
    constants = _read_constants(stored, before, plain.parent)
    arrays = chain(constants, _convert(before, packed, stored))
    _rewire(model, packed)
    # Nothing is inlined: the operator reads the mapped data file in place.
    write_model(model, arrays, plain.parent, name, lambda: properties, inline_bytes=0)

    _compare(plain, plain.with_name(name), packed)

    files = [file for file in plain.parent.iterdir() if file.name.startswith(name)]
    size_bytes = sum(file.stat().st_size for file in files)
    return (
        f"{name} ({size_bytes / 1e6:,.1f} MB) has the same weights for racdeploy's operator, "
        f"which multiplies {len(packed)} tensors as they are packed"
    )


def check_layout_version(model: ModelProto, path: Path) -> None:
    """Refuse a graph whose matrices have the layout of another version of racdeploy."""
    for opset in model.opset_import:
        if opset.domain == OPERATOR_DOMAIN and opset.version != LAYOUT_VERSION:
            message = (
                f"{path} packs its matrices in layout {opset.version}; known is {LAYOUT_VERSION}"
            )
            remedy = "export it again, or use the racdeploy that made it"
            raise ArtifactError("unknown-packing-version", message, remedy=remedy)


def unpack_matrix(tensor: GraphTensor, arrays: Arrays) -> NDArray[np.uint8]:
    """Return the packed rows of a tensor that racdeploy's operator reads.

    Raises:
        ValueError: the arrays do not fit the tensor.
    """
    kind = KERNEL_FORMATS.get(tensor.quant)
    if kind is None or len(tensor.shape) != 2:
        raise ValueError(f"the operator knows no {tensor.quant} of shape {list(tensor.shape)}")

    O, I = tensor.shape
    parts = [np.ascontiguousarray(arrays[tensor.name + part]) for part in _PARTS]
    forms = [(part.dtype.name, part.ndim) for part in parts]
    if forms != _FORMS or len(parts[0]) != O:
        raise ValueError(f"heads, values and offsets are {forms}, with {len(parts[0])} rows")

    return from_sparse(kind, SparseMatrix(*parts), I)


def _read_constants(
    stored: StoredArrays, tensors: Sequence[GraphTensor], folder: Path
) -> list[tuple[str, NDArray[Any]]]:
    """Return name and values of the initializers that belong to none of the plain tensors."""
    suffixes = BaseGraphPacker.ARRAY_SUFFIXES
    named = {tensor.name + suffix for tensor in tensors for suffix in suffixes}
    return [
        (name, read_array(initializer, folder))
        for name, initializer in stored.unread.items()
        if name not in named
    ]


def _convert(
    tensors: Sequence[GraphTensor], packed: Mapping[str, GraphTensor], stored: StoredArrays
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the arrays of the accelerated graph, one tensor at a time."""
    for tensor in tensors:
        arrays, _ = stored.read(tensor)

        if tensor.name in packed:
            matrix = to_sparse(KERNEL_FORMATS[tensor.quant], arrays_to_rows(tensor, arrays))
            parts = matrix.heads_OP, matrix.values, matrix.offsets
            names = [tensor.name + part for part in _PARTS]
            arrays = dict(zip(names, parts, strict=True))

        yield from arrays.items()


def _rewire(model: ModelProto, packed: Mapping[str, GraphTensor]) -> None:
    """Replace the products of packed tensors, and remove the nodes that only these read."""
    # In f16 a product reads a Cast of the weight, ``NAME.f32``.
    widened = {f"{name}{part}": name for name in packed for part in ("", ".f32")}

    nodes = []
    for node in model.graph.node:
        if node.op_type in _PRODUCTS and node.input[1] in widened:
            node = _make_product(node, packed[widened[node.input[1]]])
        nodes.append(node)

    del model.graph.node[:], model.graph.initializer[:]
    read = {value.name for value in model.graph.output}
    for node in nodes:
        read.update(node.input)

    for node in nodes:
        if not node.name.startswith(NODE_PREFIX) or read.intersection(node.output):
            model.graph.node.append(node)

    model.opset_import.append(helper.make_opsetid(OPERATOR_DOMAIN, LAYOUT_VERSION))


def _make_product(node: NodeProto, tensor: GraphTensor) -> NodeProto:
    O, I = tensor.shape
    inputs = [node.input[0], *(tensor.name + part for part in _PARTS)]
    attributes = {"I": I, "O": O, "quant": KERNEL_FORMATS[tensor.quant].ggml_type}
    return helper.make_node(
        _OPERATOR, inputs, list(node.output), node.name, domain=OPERATOR_DOMAIN, **attributes
    )


def _summarize(
    packed: Mapping[str, GraphTensor], zeros: Mapping[str, float]
) -> list[PackedWeights]:
    """Return for each number format how many weights are packed, and their fraction of zeros."""
    weights: Counter[int] = Counter()
    zero_counts: defaultdict[int, float] = defaultdict(float)
    for name, tensor in packed.items():
        ggml_type = KERNEL_FORMATS[tensor.quant].ggml_type
        count = math.prod(tensor.shape)

        weights[ggml_type] += count
        zero_counts[ggml_type] += count * zeros[name]

    return [
        {"quant": ggml_type, "weights": count, "zeros": zero_counts[ggml_type] / count}
        for ggml_type, count in weights.items()
    ]


def _compare(plain: Path, accel: Path, packed: Mapping[str, GraphTensor]) -> None:
    """Read the packed tensors back from the disk and compare them with the plain ones."""
    before = StoredArrays(load_graph(plain), plain)
    after = StoredArrays(load_graph(accel), accel)

    for tensor in packed.values():
        expected, _ = before.read(replace(tensor, packing="plain"))
        written, _ = after.read(tensor)

        if not np.array_equal(arrays_to_rows(tensor, expected), arrays_to_rows(tensor, written)):
            message = f"{accel} does not hold the weights of {tensor.name!r}"
            raise EngineError("packed-weights-differ", message, remedy="check disk and memory")
