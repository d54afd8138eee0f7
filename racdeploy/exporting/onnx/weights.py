"""Quantize the weights of a graph into arrays, and connect the nodes that read them.

A linear in f16 is cast to float32 by a node that onnxruntime folds when it loads the model. Scales
are stored in float32: onnxruntime 1.32 ignores scales behind a Cast that it does not fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from racdeploy import quant as quants
from racdeploy.exporting.onnx.graph import WeightlessGraph
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx.packer import NODE_PREFIX, Arrays
from racdeploy.packing.onnx.tensors import GraphTensor, rows_to_arrays
from racdeploy.quant.matmulnbits import BLOCK_SIZE, zero_code
from racdeploy.results.pruning import VECTORS_IN_F32
from racdeploy.tensors.safetensors import PackedEntry, to_float32

HEAD = "lm_head.weight"
_WIDE = "matmulnbits_8"
_SLAB_WEIGHTS = 4_194_304
# onnxruntime then rounds activations to 8 bits in blocks of 32, which is several times as fast.
_ACCURACY_LEVEL = 4

Shared = dict[str, NodeProto]
"""Nodes that several others read, by output name; each is once in the graph, in front."""


@dataclass(frozen=True)
class OnnxTensorPlan:
    """A tensor to write."""

    tensor: GraphTensor  # its entry in the file's list of tensors
    requested_quant: str
    reason: str  # why it is in another number format, or empty


def plan_tensors(
    checkpoint: Checkpoint, graph: WeightlessGraph, quant: str
) -> list[OnnxTensorPlan]:
    """Plan the tensors in the checkpoint's order."""
    plan = []
    for name, entry in checkpoint.entries.items():
        if name in graph.linears | graph.embeddings | graph.vectors:
            is_embedding = name in graph.embeddings
            chosen, reason = choose_quant(name, entry.shape, quant, is_embedding)
            tensor = GraphTensor(name, entry.shape, chosen, is_embedding=is_embedding)
            plan.append(OnnxTensorPlan(tensor, quant, reason))
    return plan


def choose_quant(
    name: str, shape: tuple[int, ...], quant: str, is_embedding: bool
) -> tuple[str, str]:
    """Return the number format of a tensor, and why it is not the requested one, or nothing."""
    if len(shape) != 2:
        return "f32", "" if quant == "f32" else VECTORS_IN_F32

    actual = quant
    reason = ""
    if (is_embedding or name == HEAD) and quants.is_matmulnbits(quant) and quant != _WIDE:
        actual = _WIDE
        reason = "embedding and output keep 8 bits"
    actual, misfit = quants.fit_rows(actual, shape[1])
    return actual, "; ".join(filter(None, [reason, misfit]))


def quantize_tensor(
    checkpoint: Checkpoint, tensor: GraphTensor, advance: Callable[[int], None]
) -> tuple[Arrays, int]:
    """Return the arrays of a tensor by their names in the file, and its number of zeros.

    What the checkpoint has in the tensor's number format stays as it is.

    Args:
        advance: called with the number of weights done since the last call.

    Raises:
        ModelError: a weight is not finite, or too large for the number format.
    """
    quant = quants.load(tensor.quant)
    raw_OI = checkpoint.read_raw(tensor.name).reshape(-1, tensor.shape[-1])
    O, I = raw_OI.shape

    entry = checkpoint.entries[tensor.name]
    ready_OP = None
    if isinstance(entry, PackedEntry) and entry.quant == tensor.quant:
        ready_OP = entry.read_packed()

    # Slabs of rows bound the memory of float32 copies.
    parts = []
    zeros = 0
    rows = max(1, _SLAB_WEIGHTS // I)
    for start in range(0, O, rows):
        weight_OI = to_float32(raw_OI[start : start + rows])
        packed_OP = (
            quant.quantize(weight_OI) if ready_OP is None else ready_OP[start : start + rows]
        )
        stored_OI = quant.dequantize(packed_OP, I)
        quants.check_finite(tensor.name, tensor.quant, weight_OI, stored_OI, wider="f32")

        zeros += int(np.count_nonzero(stored_OI == 0))
        parts.append(packed_OP)
        advance(weight_OI.size)

    packed_OP = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return rows_to_arrays(tensor, packed_OP), zeros


def connect_weights(graph: WeightlessGraph, tensors: list[GraphTensor]) -> ModelProto:
    """Return the graph with nodes that read the arrays which :func:`quantize_tensor` returns."""
    by_name = {tensor.name: tensor for tensor in tensors}
    model = ModelProto()
    model.CopyFrom(graph.model)

    shared: Shared = {}
    nodes: list[NodeProto] = []
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


def _make_product(node: NodeProto, tensor: GraphTensor, shared: Shared) -> NodeProto:
    if tensor.is_matmulnbits:
        O, I = tensor.shape
        codec = quants.load_matmulnbits(tensor.quant)

        codes = tensor.name
        if tensor.is_embedding:  # tied: the lookup reads codes of two axes, the product of three
            shape = helper.make_tensor(
                "shape", TensorProto.INT64, [3], [O, I // BLOCK_SIZE, BLOCK_SIZE]
            )
            axes = _share(shared, "Constant", [], f"{tensor.name}.axes", value=shape)
            codes = _share(shared, "Reshape", [tensor.name, axes], f"{tensor.name}.blocks")

        inputs = [node.input[0], codes, f"{tensor.name}.scales"]
        if codec.has_zero_points:
            inputs.append(f"{tensor.name}.zero_points")
        return helper.make_node(
            "MatMulNBits",
            inputs,
            list(node.output),
            node.name,
            domain="com.microsoft",
            K=I,
            N=O,
            bits=codec.code_bits,
            block_size=BLOCK_SIZE,
            accuracy_level=_ACCURACY_LEVEL,
        )

    weight = tensor.name
    if tensor.quant != "f32":
        wide = f"{tensor.name}.f32"
        weight = _share(shared, "Cast", [weight], wide, to=TensorProto.FLOAT)

    if tensor.is_embedding:
        weight = _share(shared, "Transpose", [weight], f"{tensor.name}.turned", perm=[1, 0])
    return helper.make_node("MatMul", [node.input[0], weight], list(node.output), node.name)


def _make_lookup(node: NodeProto, tensor: GraphTensor, shared: Shared) -> Iterator[NodeProto]:
    outputs = list(node.output)
    inputs = [tensor.name, node.input[1]]

    if tensor.is_matmulnbits:
        yield from _make_block_lookup(node, tensor, shared)
    elif tensor.quant == "f32":
        yield helper.make_node("Gather", inputs, outputs, node.name, axis=0)
    else:
        # Cast the rows that were looked up: the table stays f16 in memory.
        narrow = f"{tensor.name}.rows"
        yield helper.make_node("Gather", inputs, [narrow], node.name, axis=0)
        widened = NODE_PREFIX + narrow
        yield helper.make_node("Cast", [narrow], outputs, widened, to=TensorProto.FLOAT)


def _make_block_lookup(node: NodeProto, tensor: GraphTensor, shared: Shared) -> Iterator[NodeProto]:
    """Yield nodes that look up rows of 8-bit codes and scale them.

    GatherBlockQuantized does the same in one node, but is missing in browsers.
    """
    assert tensor.quant == _WIDE, "an embedding keeps at least 8 bits"
    block_shape = _share_integers(shared, [0, 0, -1, BLOCK_SIZE])
    middle = float(zero_code(8))
    zero = _share(shared, "Constant", [], f"{NODE_PREFIX}zero_code", value_float=middle)
    last_axis = _share_integers(shared, [-1])
    row_shape = _share_integers(shared, [0, 0, tensor.shape[1]])
    indices = node.input[1]

    # Names of the values between the nodes.
    prefix = f"{NODE_PREFIX}{tensor.name}"
    codes, wide, coded = f"{prefix}.codes", f"{prefix}.wide", f"{prefix}.coded"
    scale, scales = f"{prefix}.scale", f"{prefix}.scales"
    whole, blocks = f"{prefix}.whole", f"{prefix}.blocks"

    yield _make_step("Gather", [tensor.name, indices], codes, axis=0)
    yield _make_step("Cast", [codes], wide, to=TensorProto.FLOAT)
    yield _make_step("Reshape", [wide, block_shape], coded)
    yield _make_step("Sub", [coded, zero], whole)
    yield _make_step("Gather", [f"{tensor.name}.scales", indices], scale, axis=0)
    yield _make_step("Unsqueeze", [scale, last_axis], scales)
    yield _make_step("Mul", [whole, scales], blocks)
    yield _make_step("Reshape", [blocks, row_shape], node.output[0])


def _make_step(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    """Return a node of one output, after which it is named."""
    return helper.make_node(op, inputs, [output], NODE_PREFIX + output, **attributes)


def _share_integers(shared: Shared, values: list[int]) -> str:
    name = f"{NODE_PREFIX}integers.{'_'.join(map(str, values))}"
    return _share(shared, "Constant", [], name, value_ints=values)


def _share(shared: Shared, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
    if output not in shared:
        shared[output] = helper.make_node(op, inputs, [output], NODE_PREFIX + output, **attributes)
    return output
