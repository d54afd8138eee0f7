"""Put the checkpoint's weights into a graph, in a number format: which arrays the file holds, which nodes read them.

A linear in f32 or f16 is stored inputs first, as MatMul takes it, and widened by a Cast that onnxruntime folds when it
loads the model. In a block format it is a MatMulNBits, and an embedding looks its rows up in the same codes. Scales are
in float32: behind a Cast that is not folded, because a session does not optimize, onnxruntime 1.32 ignores them.
The array that zeros are counted in, and that a packing packs, has the tensor's own name.
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
from racdeploy.models.checkpoint import Checkpoint, widen
from racdeploy.packing.onnx.packer import NODE_PREFIX, Arrays
from racdeploy.packing.onnx.tensors import GraphTensor, split_arrays
from racdeploy.quant.matmulnbits import BLOCK

_FALLBACK = "f16"
_WIDE = "matmulnbits_8"
_SLAB_WEIGHTS = 4_194_304
_ACCURACY_LEVEL = (
    4  # onnxruntime rounds activations to 8 bits by block of 32, and is several times as fast
)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write.

    Args:
        graph: what the file says of it.
        quant_asked: number format asked for.
        reason: why it is another one, or empty.
    """

    graph: GraphTensor
    quant_asked: str
    reason: str


def plan_tensors(
    checkpoint: Checkpoint, graph: Graph, quant: str, dense: frozenset[str]
) -> list[PlannedTensor]:
    """Plan every tensor of the file, in the checkpoint's order.

    Args:
        checkpoint: the model folder.
        graph: its graph without weights.
        quant: number format of the linears.
        dense: embedding and output, which keep 8 bits.
    """
    plan = []
    for name, entry in checkpoint.entries.items():
        if name in graph.linears | graph.embeddings | graph.vectors:
            real, reason = _choose(name, entry.shape, quant, name in dense)
            tensor = GraphTensor(name, entry.shape, real, looked_up=name in graph.embeddings)
            plan.append(PlannedTensor(tensor, quant, reason))
    return plan


def _choose(name: str, shape: tuple[int, ...], quant: str, dense: bool) -> tuple[str, str]:
    if len(shape) == 1:
        return "f32", "" if quant == "f32" else "vectors are stored in f32"
    chosen, reason = quant, ""
    if dense and quants.is_blocks(quant) and quant != _WIDE:
        chosen, reason = _WIDE, "embedding and output keep 8 bits"
    if why := quants.fits(quants.load(chosen), shape[1]):
        return _FALLBACK, "; ".join(filter(None, [reason, why]))
    return chosen, reason


def encode(
    checkpoint: Checkpoint, tensor: GraphTensor, advance: Callable[[int], None]
) -> tuple[Arrays, int]:
    """Return the arrays of a tensor, by their name in the file, and how many of its weights are zero.

    Raises:
        ModelError: a weight is not finite, or too large for the number format.
    """
    quant = quants.load(tensor.quant)
    raw_OI = checkpoint.read_raw(tensor.name)
    raw_OI = raw_OI.reshape(1, -1) if raw_OI.ndim == 1 else raw_OI
    O, I = raw_OI.shape
    parts, zeros = [], 0
    for start in range(0, O, step := max(1, _SLAB_WEIGHTS // I)):
        weight_OI = widen(raw_OI[start : start + step])
        packed_OP = quant.quantize(weight_OI)
        stored_OI = quant.dequantize(packed_OP, I)
        quants.check_finite(tensor.name, tensor.quant, weight_OI, stored_OI, wider="f32")
        zeros += stored_OI.size - int(np.count_nonzero(stored_OI))
        parts.append(packed_OP)
        advance(weight_OI.size)
    return split_arrays(tensor, np.concatenate(parts) if len(parts) > 1 else parts[0]), zeros


def wire(graph: Graph, tensors: list[GraphTensor]) -> onnx.ModelProto:
    """Return the graph with every weight read from the arrays that :func:`encode` makes."""
    by_name = {tensor.name: tensor for tensor in tensors}
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    first: dict[
        str, onnx.NodeProto
    ] = {}  # by output: what several nodes share stands in front, once
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in graph.linears:
            nodes += _linear(node, by_name[node.input[1]], first)
        elif node.op_type == "Gather" and node.input[0] in graph.embeddings:
            nodes += _lookup(node, by_name[node.input[0]], first)
        else:
            nodes.append(node)
    every = [*first.values(), *nodes]
    del model.graph.node[:]
    model.graph.node.extend(every)
    if "com.microsoft" not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def _linear(
    node: onnx.NodeProto, tensor: GraphTensor, first: dict[str, onnx.NodeProto]
) -> Iterator[onnx.NodeProto]:
    O, I = tensor.shape
    if tensor.is_blocks:
        codes = tensor.name
        if tensor.looked_up:  # one table for both: the lookup takes two axes, the product three
            shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [3], [O, I // BLOCK, BLOCK])
            axes = _shared(first, "Constant", [], f"{tensor.name}.axes", value=shape)
            codes = _shared(first, "Reshape", [tensor.name, axes], f"{tensor.name}.blocks")
        inputs = [node.input[0], codes, f"{tensor.name}.scales"]
        quant = quants.load_blocks(tensor.quant)
        if quant.ZERO_POINTS:
            inputs.append(f"{tensor.name}.zero_points")
        attributes: dict[str, Any] = {
            "K": I,
            "N": O,
            "bits": quant.CODE_BITS,
            "block_size": BLOCK,
            "accuracy_level": _ACCURACY_LEVEL,
        }
        yield helper.make_node(
            "MatMulNBits",
            inputs,
            list(node.output),
            node.name,
            domain="com.microsoft",
            **attributes,
        )
        return
    weight = tensor.name
    if tensor.quant != "f32":
        weight = _shared(first, "Cast", [weight], f"{tensor.name}.f32", to=onnx.TensorProto.FLOAT)
    if tensor.looked_up:
        weight = _shared(first, "Transpose", [weight], f"{tensor.name}.turned", perm=[1, 0])
    yield helper.make_node("MatMul", [node.input[0], weight], list(node.output), node.name)


def _lookup(
    node: onnx.NodeProto, tensor: GraphTensor, first: dict[str, onnx.NodeProto]
) -> Iterator[onnx.NodeProto]:
    indices = node.input[1]
    if tensor.is_blocks:
        yield from _lookup_blocks(node, tensor, first)
        return
    if tensor.quant == "f32":
        yield helper.make_node(
            "Gather", [tensor.name, indices], list(node.output), node.name, axis=0
        )
        return
    narrow = (
        f"{tensor.name}.rows"  # widened behind the lookup, so that the table stays narrow in memory
    )
    yield helper.make_node("Gather", [tensor.name, indices], [narrow], node.name, axis=0)
    yield helper.make_node(
        "Cast", [narrow], list(node.output), NODE_PREFIX + narrow, to=onnx.TensorProto.FLOAT
    )


def _lookup_blocks(
    node: onnx.NodeProto, tensor: GraphTensor, first: dict[str, onnx.NodeProto]
) -> Iterator[onnx.NodeProto]:
    """Look rows of 8-bit codes up and scale them, in plain operators: browsers lack GatherBlockQuantized."""
    assert tensor.quant == _WIDE, "an embedding keeps at least 8 bits"
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Gather", [tensor.name, node.input[1]], "codes", {"axis": 0}),
        ("Cast", ["codes"], "wide", {"to": onnx.TensorProto.FLOAT}),
        ("Reshape", ["wide", _integers(first, [0, 0, -1, BLOCK])], "coded", {}),
        (
            "Sub",
            ["coded", _shared(first, "Constant", [], f"{NODE_PREFIX}zero_code", value_float=128.0)],
            "whole",
            {},
        ),
        ("Gather", [f"{tensor.name}.scales", node.input[1]], "scale", {"axis": 0}),
        ("Unsqueeze", ["scale", _integers(first, [-1])], "scales", {}),
        ("Mul", ["whole", "scales"], "blocks", {}),
        ("Reshape", ["blocks", _integers(first, [0, 0, tensor.shape[1]])], "rows", {}),
    ]
    names = {output: f"{NODE_PREFIX}{tensor.name}.{output}" for _, _, output, _ in steps} | {
        "rows": node.output[0]
    }
    for op, inputs, output, attributes in steps:
        yield helper.make_node(
            op,
            [names.get(name, name) for name in inputs],
            [names[output]],
            NODE_PREFIX + names[output],
            **attributes,
        )


def _integers(first: dict[str, onnx.NodeProto], values: list[int]) -> str:
    return _shared(
        first,
        "Constant",
        [],
        f"{NODE_PREFIX}integers.{'_'.join(map(str, values))}",
        value_ints=values,
    )


def _shared(
    first: dict[str, onnx.NodeProto], op: str, inputs: list[str], output: str, **attributes: Any
) -> str:
    if output not in first:
        first[output] = helper.make_node(op, inputs, [output], NODE_PREFIX + output, **attributes)
    return output
