"""Put weights into a graph, in a number format: which arrays the file holds, which nodes read them.

A linear in f16 is widened by a Cast that onnxruntime folds when it loads the model. Scales are in
float32: behind a Cast that is not folded, onnxruntime 1.32 ignores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from racdeploy import quant as quants
from racdeploy.export.onnx.graph import Graph
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx.packer import NODE_PREFIX, Arrays
from racdeploy.packing.onnx.tensors import GraphTensor, split_arrays
from racdeploy.quant.matmulnbits import BLOCK
from racdeploy.results.pruning import VECTORS_IN_F32
from racdeploy.tensors.safetensors import widen

_FALLBACK = "f16"
_WIDE = "matmulnbits_8"
_SLAB_WEIGHTS = 4_194_304
# onnxruntime rounds activations to 8 bits by block of 32, and is several times as fast.
_ACCURACY_LEVEL = 4

Shared = dict[str, onnx.NodeProto]
"""Nodes that several others read, by their output; they stand in front of all others, once."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write."""

    graph: GraphTensor  # what the file says of it
    quant_asked: str
    reason: str  # why it is in another number format, or empty


def plan_tensors(
    checkpoint: Checkpoint, graph: Graph, quant: str, dense: frozenset[str]
) -> list[PlannedTensor]:
    """Plan the tensors in the checkpoint's order; those in ``dense`` keep at least 8 bits."""
    plan = []
    for name, entry in checkpoint.entries.items():
        if name in graph.linears | graph.embeddings | graph.vectors:
            real, reason = choose_quant(name, entry.shape, quant, name in dense)
            tensor = GraphTensor(name, entry.shape, real, looked_up=name in graph.embeddings)
            plan.append(PlannedTensor(tensor, quant, reason))
    return plan


def choose_quant(name: str, shape: tuple[int, ...], quant: str, dense: bool) -> tuple[str, str]:
    """Return the number format that a tensor gets, and why it is another than asked for."""
    if len(shape) == 1:
        return "f32", "" if quant == "f32" else VECTORS_IN_F32

    chosen = quant
    reason = ""
    if dense and quants.is_blocks(quant) and quant != _WIDE:
        chosen = _WIDE
        reason = "embedding and output keep 8 bits"
    if why := quants.fits(quants.load(chosen), shape[1]):
        return _FALLBACK, "; ".join(filter(None, [reason, why]))

    return chosen, reason


def encode(
    checkpoint: Checkpoint, tensor: GraphTensor, advance: Callable[[int], None]
) -> tuple[Arrays, int]:
    """Return the arrays of a tensor by their names in the file, and how many weights are zero.

    A weight that is not finite, or too large for the number format, is a ModelError.
    """
    quant = quants.load(tensor.quant)
    raw_OI = checkpoint.read_raw(tensor.name)
    if raw_OI.ndim == 1:
        raw_OI = raw_OI.reshape(1, -1)
    O, I = raw_OI.shape

    parts = []
    zeros = 0
    rows = max(1, _SLAB_WEIGHTS // I)
    for start in range(0, O, rows):
        weight_OI = widen(raw_OI[start : start + rows])
        packed_OP = quant.quantize(weight_OI)
        stored_OI = quant.dequantize(packed_OP, I)
        quants.check_finite(tensor.name, tensor.quant, weight_OI, stored_OI, wider="f32")

        zeros += stored_OI.size - int(np.count_nonzero(stored_OI))
        parts.append(packed_OP)
        advance(weight_OI.size)

    packed_OP = parts[0]
    if len(parts) > 1:
        packed_OP = np.concatenate(parts)
    return split_arrays(tensor, packed_OP), zeros


def wire(graph: Graph, tensors: list[GraphTensor]) -> onnx.ModelProto:
    """Return the graph with every weight read from the arrays that :func:`encode` makes."""
    by_name = {tensor.name: tensor for tensor in tensors}
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)

    shared: Shared = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in graph.linears:
            nodes.append(_make_product(node, by_name[node.input[1]], shared))
        elif node.op_type == "Gather" and node.input[0] in graph.embeddings:
            nodes += _make_lookup(node, by_name[node.input[0]], shared)
        else:
            nodes.append(node)

    del model.graph.node[:]
    model.graph.node.extend([*shared.values(), *nodes])
    if "com.microsoft" not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def _make_product(node: onnx.NodeProto, tensor: GraphTensor, shared: Shared) -> onnx.NodeProto:
    if tensor.is_blocks:
        return _make_block_product(node, tensor, shared)

    weight = tensor.name
    if tensor.quant != "f32":
        wide = f"{tensor.name}.f32"
        weight = _share(shared, "Cast", [weight], wide, to=onnx.TensorProto.FLOAT)

    if tensor.looked_up:
        weight = _share(shared, "Transpose", [weight], f"{tensor.name}.turned", perm=[1, 0])
    return helper.make_node("MatMul", [node.input[0], weight], list(node.output), node.name)


def _make_block_product(
    node: onnx.NodeProto, tensor: GraphTensor, shared: Shared
) -> onnx.NodeProto:
    O, I = tensor.shape
    quant = quants.load_blocks(tensor.quant)

    codes = tensor.name
    if tensor.looked_up:  # one table for both: the lookup takes two axes, the product three
        shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [3], [O, I // BLOCK, BLOCK])
        axes = _share(shared, "Constant", [], f"{tensor.name}.axes", value=shape)
        codes = _share(shared, "Reshape", [tensor.name, axes], f"{tensor.name}.blocks")

    inputs = [node.input[0], codes, f"{tensor.name}.scales"]
    if quant.ZERO_POINTS:
        inputs.append(f"{tensor.name}.zero_points")

    return helper.make_node(
        "MatMulNBits",
        inputs,
        list(node.output),
        node.name,
        domain="com.microsoft",
        K=I,
        N=O,
        bits=quant.CODE_BITS,
        block_size=BLOCK,
        accuracy_level=_ACCURACY_LEVEL,
    )


def _make_lookup(
    node: onnx.NodeProto, tensor: GraphTensor, shared: Shared
) -> Iterator[onnx.NodeProto]:
    outputs = list(node.output)
    taken = [tensor.name, node.input[1]]

    if tensor.is_blocks:
        yield from _make_block_lookup(node, tensor, shared)
    elif tensor.quant == "f32":
        yield helper.make_node("Gather", taken, outputs, node.name, axis=0)
    else:
        # Widened behind the lookup, so that the table stays narrow in memory.
        narrow = f"{tensor.name}.rows"
        yield helper.make_node("Gather", taken, [narrow], node.name, axis=0)
        widened = NODE_PREFIX + narrow
        yield helper.make_node("Cast", [narrow], outputs, widened, to=onnx.TensorProto.FLOAT)


def _make_block_lookup(
    node: onnx.NodeProto, tensor: GraphTensor, shared: Shared
) -> Iterator[onnx.NodeProto]:
    """Look rows of 8-bit codes up and scale them; browsers lack GatherBlockQuantized."""
    assert tensor.quant == _WIDE, "an embedding keeps at least 8 bits"
    by_block = _share_integers(shared, [0, 0, -1, BLOCK])
    zero_code = _share(shared, "Constant", [], f"{NODE_PREFIX}zero_code", value_float=128.0)
    last_axis = _share_integers(shared, [-1])
    by_row = _share_integers(shared, [0, 0, tensor.shape[1]])
    indices = node.input[1]

    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Gather", [tensor.name, indices], "codes", {"axis": 0}),
        ("Cast", ["codes"], "wide", {"to": onnx.TensorProto.FLOAT}),
        ("Reshape", ["wide", by_block], "coded", {}),
        ("Sub", ["coded", zero_code], "whole", {}),
        ("Gather", [f"{tensor.name}.scales", indices], "scale", {"axis": 0}),
        ("Unsqueeze", ["scale", last_axis], "scales", {}),
        ("Mul", ["whole", "scales"], "blocks", {}),
        ("Reshape", ["blocks", by_row], "rows", {}),
    ]

    names = {output: f"{NODE_PREFIX}{tensor.name}.{output}" for _, _, output, _ in steps}
    names["rows"] = node.output[0]

    for op, inputs, output, attributes in steps:
        taken = [names.get(name, name) for name in inputs]
        made = names[output]
        yield helper.make_node(op, taken, [made], NODE_PREFIX + made, **attributes)


def _share_integers(shared: Shared, values: list[int]) -> str:
    name = f"{NODE_PREFIX}integers.{'_'.join(map(str, values))}"
    return _share(shared, "Constant", [], name, value_ints=values)


def _share(shared: Shared, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
    if output not in shared:
        shared[output] = helper.make_node(op, inputs, [output], NODE_PREFIX + output, **attributes)
    return output
