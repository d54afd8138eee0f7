"""Put the checkpoint's weights into a graph, in a number format: which arrays the file holds, which nodes read them.

A linear in f32 or f16 is stored inputs first, as MatMul takes it, and widened by a Cast that onnxruntime folds when it
loads the model. In a block format it is a MatMulNBits, and an embedding looks its rows up in the same codes. Scales are
in float32: behind a Cast that is not folded, because a session does not optimize, onnxruntime 1.32 ignores them.
The array that zeros are counted in, and that a packing packs, has the tensor's own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from racdeploy import quant as quants
from racdeploy.export.onnx.graph import Graph
from racdeploy.models.checkpoint import Checkpoint, widen
from racdeploy.quant.matmulnbits import BLOCK, Blocks

PREFIX = "racdeploy/"
_FALLBACK = "f16"
_WIDE = "matmulnbits_8"
_SLAB_WEIGHTS = 4_194_304
_ACCURACY_LEVEL = (
    4  # onnxruntime rounds activations to 8 bits by block of 32, and is several times as fast
)


class _BlockQuant(quants.Quant, Protocol):
    def blocks(self, packed_OP: NDArray[np.uint8], I: int) -> Blocks: ...


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write.

    Args:
        name: in the checkpoint and in the file.
        shape: as in the checkpoint.
        quant_asked: number format asked for.
        quant_real: number format it gets.
        reason: why the two differ, or empty.
        looked_up: whether a Gather reads it, so that rows stay together.
        packing: how it is stored.
    """

    name: str
    shape: tuple[int, ...]
    quant_asked: str
    quant_real: str
    reason: str
    looked_up: bool
    packing: str = "plain"

    def to_json(self) -> dict[str, Any]:
        """Return what a reader of the file must know."""
        values = {
            "name": self.name,
            "shape": self.shape,
            "quant": self.quant_real,
            "looked_up": self.looked_up,
        }
        return values | ({} if self.packing == "plain" else {"packing": self.packing})

    @property
    def turned(self) -> bool:
        """Whether it is stored inputs first."""
        return len(self.shape) == 2 and not self.looked_up and not is_blocks(self.quant_real)


def is_blocks(quant: str) -> bool:
    """Return whether a number format is one of MatMulNBits."""
    return hasattr(quants.load(quant), "blocks")


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
            plan.append(
                PlannedTensor(name, entry.shape, quant, real, reason, name in graph.embeddings)
            )
    return plan


def _choose(name: str, shape: tuple[int, ...], quant: str, dense: bool) -> tuple[str, str]:
    if len(shape) == 1:
        return "f32", "" if quant == "f32" else "vectors are stored in f32"
    chosen, reason = quant, ""
    if dense and is_blocks(quant) and quant != _WIDE:
        chosen, reason = _WIDE, "embedding and output keep 8 bits"
    if why := quants.fits(quants.load(chosen), shape[1]):
        return _FALLBACK, "; ".join(filter(None, [reason, why]))
    return chosen, reason


def encode(
    checkpoint: Checkpoint, tensor: PlannedTensor, advance: Callable[[int], None]
) -> tuple[dict[str, NDArray[Any]], int]:
    """Return the arrays of a tensor, by their name in the file, and how many of its weights are zero.

    Raises:
        ModelError: a weight is not finite, or too large for the number format.
    """
    quant = quants.load(tensor.quant_real)
    raw_OI = checkpoint.read_raw(tensor.name)
    raw_OI = raw_OI.reshape(1, -1) if raw_OI.ndim == 1 else raw_OI
    O, I = raw_OI.shape
    parts, zeros = [], 0
    for start in range(0, O, step := max(1, _SLAB_WEIGHTS // I)):
        weight_OI = widen(raw_OI[start : start + step])
        packed_OP = quant.quantize(weight_OI)
        stored_OI = quant.dequantize(packed_OP, I)
        quants.check_finite(tensor.name, tensor.quant_real, weight_OI, stored_OI, wider="f32")
        zeros += stored_OI.size - int(np.count_nonzero(stored_OI))
        parts.append(packed_OP)
        advance(weight_OI.size)
    return arrays_of(tensor, np.concatenate(parts) if len(parts) > 1 else parts[0]), zeros


def arrays_of(tensor: PlannedTensor, packed_OP: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Return the arrays of packed rows, by their name in the file."""
    if is_blocks(tensor.quant_real):
        quant = cast(_BlockQuant, quants.load(tensor.quant_real))
        return _block_arrays(tensor, quant.blocks(packed_OP, tensor.shape[1]))
    values = packed_OP.view("<f4" if tensor.quant_real == "f32" else "<f2").reshape(tensor.shape)
    return {tensor.name: np.ascontiguousarray(values.T) if tensor.turned else values}


def _block_arrays(tensor: PlannedTensor, blocks: Blocks) -> dict[str, NDArray[Any]]:
    O, _ = tensor.shape
    code_OP = blocks.code_OP
    codes = code_OP if tensor.looked_up else code_OP.reshape(O, tensor.shape[1] // BLOCK, -1)
    arrays: dict[str, NDArray[Any]] = {
        tensor.name: np.ascontiguousarray(codes),
        f"{tensor.name}.scales": blocks.scale_OG.astype(np.float32),
    }
    if blocks.zero_OP is not None:
        arrays[f"{tensor.name}.zero_points"] = blocks.zero_OP
    return arrays


def rows_of(tensor: PlannedTensor, arrays: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """Return the packed rows whose arrays those are: the way back of :func:`arrays_of`.

    Raises:
        KeyError: an array is missing.
        ValueError: they do not fit each other, or a scale is no number of half precision.
    """
    main = arrays[tensor.name]
    if not is_blocks(tensor.quant_real):
        values = np.ascontiguousarray(main.T if tensor.turned else main)
        return values.reshape(1 if values.ndim == 1 else len(values), -1).view(np.uint8)
    scale_OG = arrays[f"{tensor.name}.scales"]
    with np.errstate(over="ignore"):
        half_OG = scale_OG.astype("<f2")
    if not np.array_equal(half_OG.astype(np.float32), scale_OG, equal_nan=True):
        raise ValueError("a scale is no number of half precision")
    scale_OP = np.ascontiguousarray(half_OG).view(np.uint8)
    zeros = arrays.get(f"{tensor.name}.zero_points")
    parts = [main.reshape(len(main), -1), scale_OP, *([] if zeros is None else [zeros])]
    return np.concatenate(parts, axis=1)


def wire(graph: Graph, plan: list[PlannedTensor]) -> onnx.ModelProto:
    """Return the graph with every weight read from the arrays that :func:`encode` makes."""
    tensors = {tensor.name: tensor for tensor in plan}
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    first: dict[
        str, onnx.NodeProto
    ] = {}  # by output: what several nodes share stands in front, once
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in graph.linears:
            nodes += _linear(node, tensors[node.input[1]], first)
        elif node.op_type == "Gather" and node.input[0] in graph.embeddings:
            nodes += _lookup(node, tensors[node.input[0]], first)
        else:
            nodes.append(node)
    every = [*first.values(), *nodes]
    del model.graph.node[:]
    model.graph.node.extend(every)
    if "com.microsoft" not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def _linear(
    node: onnx.NodeProto, tensor: PlannedTensor, first: dict[str, onnx.NodeProto]
) -> Iterator[onnx.NodeProto]:
    O, I = tensor.shape
    if is_blocks(tensor.quant_real):
        codes = tensor.name
        if tensor.looked_up:  # one table for both: the lookup takes two axes, the product three
            shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [3], [O, I // BLOCK, BLOCK])
            axes = _shared(first, "Constant", [], f"{tensor.name}.axes", value=shape)
            codes = _shared(first, "Reshape", [tensor.name, axes], f"{tensor.name}.blocks")
        inputs = [node.input[0], codes, f"{tensor.name}.scales"]
        if tensor.quant_real == "k_quant":
            inputs.append(f"{tensor.name}.zero_points")
        bits = 8 if tensor.quant_real == _WIDE else 4
        attributes: dict[str, Any] = {
            "K": I,
            "N": O,
            "bits": bits,
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
    if tensor.quant_real != "f32":
        weight = _shared(first, "Cast", [weight], f"{tensor.name}.f32", to=onnx.TensorProto.FLOAT)
    if tensor.looked_up:
        weight = _shared(first, "Transpose", [weight], f"{tensor.name}.turned", perm=[1, 0])
    yield helper.make_node("MatMul", [node.input[0], weight], list(node.output), node.name)


def _lookup(
    node: onnx.NodeProto, tensor: PlannedTensor, first: dict[str, onnx.NodeProto]
) -> Iterator[onnx.NodeProto]:
    indices = node.input[1]
    if is_blocks(tensor.quant_real):
        yield from _lookup_blocks(node, tensor, first)
        return
    if tensor.quant_real == "f32":
        yield helper.make_node(
            "Gather", [tensor.name, indices], list(node.output), node.name, axis=0
        )
        return
    narrow = (
        f"{tensor.name}.rows"  # widened behind the lookup, so that the table stays narrow in memory
    )
    yield helper.make_node("Gather", [tensor.name, indices], [narrow], node.name, axis=0)
    yield helper.make_node(
        "Cast", [narrow], list(node.output), PREFIX + narrow, to=onnx.TensorProto.FLOAT
    )


def _lookup_blocks(
    node: onnx.NodeProto, tensor: PlannedTensor, first: dict[str, onnx.NodeProto]
) -> Iterator[onnx.NodeProto]:
    """Look rows of 8-bit codes up and scale them, in plain operators: browsers lack GatherBlockQuantized."""
    assert tensor.quant_real == _WIDE, "an embedding keeps at least 8 bits"
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Gather", [tensor.name, node.input[1]], "codes", {"axis": 0}),
        ("Cast", ["codes"], "wide", {"to": onnx.TensorProto.FLOAT}),
        ("Reshape", ["wide", _integers(first, [0, 0, -1, BLOCK])], "coded", {}),
        (
            "Sub",
            ["coded", _shared(first, "Constant", [], f"{PREFIX}zero_code", value_float=128.0)],
            "whole",
            {},
        ),
        ("Gather", [f"{tensor.name}.scales", node.input[1]], "scale", {"axis": 0}),
        ("Unsqueeze", ["scale", _integers(first, [-1])], "scales", {}),
        ("Mul", ["whole", "scales"], "blocks", {}),
        ("Reshape", ["blocks", _integers(first, [0, 0, tensor.shape[1]])], "rows", {}),
    ]
    names = {output: f"{PREFIX}{tensor.name}.{output}" for _, _, output, _ in steps} | {
        "rows": node.output[0]
    }
    for op, inputs, output, attributes in steps:
        yield helper.make_node(
            op,
            [names.get(name, name) for name in inputs],
            [names[output]],
            PREFIX + names[output],
            **attributes,
        )


def _integers(first: dict[str, onnx.NodeProto], values: list[int]) -> str:
    return _shared(
        first, "Constant", [], f"{PREFIX}integers.{'_'.join(map(str, values))}", value_ints=values
    )


def _shared(
    first: dict[str, onnx.NodeProto], op: str, inputs: list[str], output: str, **attributes: Any
) -> str:
    if output not in first:
        first[output] = helper.make_node(op, inputs, [output], PREFIX + output, **attributes)
    return output
