"""Write llama-shaped ONNX graphs of random weights, of any size and number format, in a moment.

Nodes are those of onnxruntime-genai's model builder, whose graphs an export prefers, and weights
are put into them as an export does it.
Source: ``onnxruntime_genai/models/builders/base.py``, version 0.15.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from racdeploy.export.onnx.graph import Graph
from racdeploy.export.onnx.weights import wire
from racdeploy.packing.onnx.tensors import GraphTensor, split_arrays
from racdeploy.tune.devices.synthetic import Dimensions, random_rows

_POSITIONS = 2048
_EMBEDDING = "embedding"
_OPSET, _IR_VERSION = 21, 10
_EPSILON = 1e-5
_MICROSOFT = "com.microsoft"
_BATCH, _LENGTH, _TOTAL = "batch_size", "sequence_length", "total_sequence_length"


def write_graph(file: Path, quant: str, size: Dimensions, head_quant: str) -> Path:
    """Write a graph whose matrices have a number format, and its tied embedding another."""
    tensors = _list_tensors(quant, size, head_quant)
    linears = frozenset(tensor.name for tensor in tensors)
    graph = Graph(_Drawing(size).draw(), {}, linears, frozenset({_EMBEDDING}), frozenset())

    model = wire(graph, tensors)
    for name, values in _make_arrays(tensors, size):
        model.graph.initializer.append(numpy_helper.from_array(values, name))

    file.write_bytes(model.SerializeToString())
    return file


def _list_tensors(quant: str, size: Dimensions, head_quant: str) -> list[GraphTensor]:
    shape = (size.vocabulary, size.hidden)
    tensors = [GraphTensor(_EMBEDDING, shape, head_quant, looked_up=True)]
    for block in range(size.blocks):
        for name, matrix in size.matrices.items():
            tensors.append(GraphTensor(f"{block}.{name}", matrix, quant, looked_up=False))
    return tensors


def _make_arrays(
    tensors: Sequence[GraphTensor], size: Dimensions
) -> Iterator[tuple[str, NDArray[Any]]]:
    yield "norm", np.ones(size.hidden, np.float32)

    rate_K = 10_000.0 ** -np.linspace(0, 1, size.head_size // 2)
    angle_TK = np.outer(np.arange(_POSITIONS), rate_K)
    yield "cos_cache", np.cos(angle_TK).astype(np.float32)
    yield "sin_cache", np.sin(angle_TK).astype(np.float32)

    for number, tensor in enumerate(tensors):
        rows, columns = tensor.shape
        slab_OP = random_rows(tensor.quant, columns)
        turns = -(-rows // len(slab_OP))
        packed_OP = np.tile(slab_OP, (turns, 1))[:rows]

        # No two are equal: onnxruntime would keep one of them for both.
        packed_OP[0, :2] = divmod(number, 256)[::-1]
        yield from split_arrays(tensor, packed_OP).items()


class _Drawing:
    """Draws the graph without weights, block after block."""

    def __init__(self, size: Dimensions) -> None:
        self._size = size
        self._nodes: list[onnx.NodeProto] = []
        self._caches: list[str] = []

    def draw(self) -> onnx.ModelProto:
        """Return the graph; matrices have the names of the tensors."""
        self._count_positions()
        self._add("Gather", [_EMBEDDING, "input_ids"], ["rows"])
        self._add("SimplifiedLayerNormalization", ["rows", "norm"], ["0.in"], epsilon=_EPSILON)

        stream = "rows"
        for block in range(self._size.blocks):
            stream = self._add_block(block, stream)

        self._add("MatMul", [f"{self._size.blocks}.in", _EMBEDDING], ["logits"])
        return self._make_model()

    def _count_positions(self) -> None:
        """Add what tells attention how long each sequence is, and the longest of them."""
        for name, value in (("ones", [1]), ("one", 1)):
            key = "value_ints" if isinstance(value, list) else "value_int"
            self._add("Constant", [], [name], **{key: value})

        self._add("ReduceSum", ["attention_mask", "ones"], ["lengths"], keepdims=0)
        self._add("Sub", ["lengths", "ones"], ["last"])
        self._add("Cast", ["last"], ["last32"], to=TensorProto.INT32)
        self._add("Shape", ["attention_mask"], ["extents"])
        self._add("Gather", ["extents", "one"], ["total"], axis=0)
        self._add("Cast", ["total"], ["total32"], to=TensorProto.INT32)

    def _add_block(self, block: int, stream: str) -> str:
        """Add a block whose input is there; return the name of what runs past the next norm."""
        size = self._size
        at = f"{block}."
        for name in ("attn_q", "attn_k", "attn_v"):
            self._add("MatMul", [f"{at}in", f"{at}{name}"], [f"{at}{name}.out"])

        past = [f"past_key_values.{block}.{each}" for each in ("key", "value")]
        present = [f"present.{block}.{each}" for each in ("key", "value")]
        self._caches += [*past, *present]
        self._add(
            "GroupQueryAttention",
            [
                *(f"{at}{name}.out" for name in ("attn_q", "attn_k", "attn_v")),
                *(*past, "last32", "total32", "cos_cache", "sin_cache"),
            ],
            [f"{at}attended", *present],
            domain=_MICROSOFT,
            num_heads=size.heads,
            kv_num_heads=size.key_value_heads,
            scale=size.head_size**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
        )
        self._add("MatMul", [f"{at}attended", f"{at}attn_output"], [f"{at}mixed"])
        stream = self._add_norm(stream, f"{at}mixed", f"{at}between")

        for name in ("ffn_gate", "ffn_up"):
            self._add("MatMul", [f"{at}between", f"{at}{name}"], [f"{at}{name}.out"])
        self._add("Sigmoid", [f"{at}ffn_gate.out"], [f"{at}sigmoid"])
        self._add("Mul", [f"{at}ffn_gate.out", f"{at}sigmoid"], [f"{at}opened"])
        self._add("Mul", [f"{at}opened", f"{at}ffn_up.out"], [f"{at}channels"])
        self._add("MatMul", [f"{at}channels", f"{at}ffn_down"], [f"{at}added"])
        return self._add_norm(stream, f"{at}added", f"{block + 1}.in")

    def _add_norm(self, stream: str, added: str, normed: str) -> str:
        """Add what a linear gives to the stream, and norm it; return the name of the stream."""
        onward = f"{normed}.stream"
        outputs = [normed, "", "", onward]
        self._add(
            "SkipSimplifiedLayerNormalization",
            [stream, added, "norm"],
            outputs,
            domain=_MICROSOFT,
            epsilon=_EPSILON,
        )
        return onward

    def _add(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        node = helper.make_node(op, inputs, outputs, f"make {outputs[0]}", **attributes)
        self._nodes.append(node)

    def _make_model(self) -> onnx.ModelProto:
        size = self._size
        whole = TensorProto.INT64
        inputs = [
            helper.make_tensor_value_info("input_ids", whole, [_BATCH, _LENGTH]),
            helper.make_tensor_value_info("attention_mask", whole, [_BATCH, _TOTAL]),
        ]
        shape = [_BATCH, _LENGTH, size.vocabulary]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)]

        for name in self._caches:
            is_past = name.startswith("past")
            length = "past_sequence_length" if is_past else _TOTAL
            shape = [_BATCH, size.key_value_heads, length, size.head_size]
            value = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            (inputs if is_past else outputs).append(value)

        graph = helper.make_graph(self._nodes, "synthetic", inputs, outputs)
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)]
        return helper.make_model(graph, ir_version=_IR_VERSION, opset_imports=opsets)
