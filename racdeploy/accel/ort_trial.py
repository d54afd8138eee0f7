"""The trial of the operator, in a process of its own: LIBRARY → its proof as one line of JSON.

Right: products of random sparse matrices against stock MatMulNBits and MatMul, with inputs that
neither of them has to round, so that what is left is the rounding of float32 sums. Faster: one
token, processor time of one thread, alternating with the stock operator, medians.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from racdeploy import quant as quants
from racdeploy.accel.ggml_plugin import NAMES
from racdeploy.accel.proof import Proof
from racdeploy.packing.sparse_matrix import KINDS, LAYOUT, SparseMatrix, split

_SHAPES = ((64, 256), (100, 576), (7, 1056), (33, 32), (256, 2048))
_TOKENS = (1, 2, 5, 37)
_TOLERANCE = 1e-6  # of the largest output: both sum at most 2048 products in float32
_SPEED_SHAPE = (4096, 8192)  # beyond most caches
_SPARSITIES = (0.5, 0.6, 0.7)
_ROUNDS = 15
_IR_VERSION, _OPSET = 9, 17  # of ONNX; what every onnxruntime with the operator's interface reads
Array = NDArray[Any]


def main() -> None:
    """Print the proof of one library."""
    library = Path(sys.argv[1])
    onnxruntime.set_default_logger_severity(3)

    kernels = _instruction_set(library)
    difference, refusal = compare(library)
    speedups: dict[str, dict[str, float]] = {}
    if not refusal:
        for name, kind in KINDS.items():
            speedups[NAMES[kind.ggml_type]] = _speedups(library, name)
    print(json.dumps(asdict(Proof(refusal, "", kernels, difference, speedups))))


def make_stock(
    name: str, packed_OP: Array, I: int, number: int = 0
) -> tuple[onnx.NodeProto, dict[str, Array]]:
    """Return a node of the stock operator for packed rows, and its initializers."""
    quant = quants.load(name)
    if name == "f16":  # as onnxruntime keeps it: float32, inputs first
        weight_OI = quant.dequantize(packed_OP, I)
        arrays = {f"weight{number}": np.ascontiguousarray(weight_OI.T)}
        node = helper.make_node("MatMul", ["x", *arrays], [f"y{number}"])
        return node, arrays

    bits = int(quant.BITS)
    O = len(packed_OP)
    code_OP, scale_OP = np.split(packed_OP, [I * bits // 8], axis=1)
    code_OGP = np.ascontiguousarray(code_OP).reshape(O, I // 32, -1)
    scale_OG = np.ascontiguousarray(scale_OP).view("<f2")
    arrays = {f"codes{number}": code_OGP, f"scales{number}": scale_OG.astype(np.float32)}

    attributes = {"K": I, "N": O, "bits": bits, "block_size": 32, "accuracy_level": 4}
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], [f"y{number}"], domain="com.microsoft", **attributes
    )
    return node, arrays


def make_sparse(
    name: str, matrix: SparseMatrix, I: int, number: int = 0, /, **attributes: int
) -> tuple[onnx.NodeProto, dict[str, Array]]:
    """Return a node of our operator and its initializers; ``attributes`` override the matrix's."""
    kind = KINDS[name]
    arrays: dict[str, Array] = {
        f"heads{number}": matrix.heads_OP,
        f"values{number}": matrix.values,
        f"offsets{number}": matrix.offsets,
    }
    attributes = {"I": I, "O": len(matrix.heads_OP), "quant": kind.ggml_type} | attributes
    node = helper.make_node(
        "SparseMatMul", ["x", *arrays], [f"y{number}"], domain="racdeploy", **attributes
    )
    return node, arrays


def make_model(
    nodes: Sequence[onnx.NodeProto], arrays: Mapping[str, Array], I: int, version: int = LAYOUT
) -> bytes:
    """Return a model of those operators on one input ``x``; all are outputs.

    Args:
        nodes: in order.
        arrays: initializers by name.
        I: last of the three dimensions of the input.
        version: of our operator.
    """
    float32 = onnx.TensorProto.FLOAT

    x = helper.make_tensor_value_info("x", float32, ["open0", "open1", I])
    outputs = [helper.make_tensor_value_info(node.output[0], float32, None) for node in nodes]
    initializers = [numpy_helper.from_array(values, name) for name, values in arrays.items()]
    graph = helper.make_graph(nodes, "graph", [x], outputs, initializers)

    versions = {"": _OPSET, "com.microsoft": 1, "racdeploy": version}
    opsets = [helper.make_opsetid(domain, number) for domain, number in versions.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())


def open_session(graph: bytes, library: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """Load a graph that may hold the operator."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Another session is measured meanwhile: this one's threads must not spin.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def compare(library: Path) -> tuple[float, str]:
    """Return the largest difference over the largest output, and what is wrong with it."""
    generator = np.random.default_rng(0)
    largest = 0.0
    for name in KINDS:
        for O, I in _SHAPES:
            sparsity = generator.choice([0.3, 0.5, 0.7, 1.0])
            stock, ours = _open_pair(library, name, _draw_rows(generator, name, O, I, sparsity), I)

            for tokens in _TOKENS:
                feeds = {"x": _draw_exact_inputs(generator, tokens, I)}
                expected_BTO = stock.run(None, feeds)[0]
                found_BTO = ours.run(None, feeds)[0]
                case = f"{name}, {O} × {I}, {tokens} tokens"
                if found_BTO.shape != expected_BTO.shape:
                    return largest, f"{case}: its shape is {found_BTO.shape}"

                error = np.abs(expected_BTO - found_BTO).max()
                scale = max(np.abs(expected_BTO).max(), 1e-30)
                difference = float(error / scale)
                largest = max(largest, difference)
                if not difference <= _TOLERANCE:  # nor is a difference that is no number
                    return largest, (
                        f"{case}: it is {difference:.1e} of the maximum off the stock operator"
                    )
    return largest, ""


def _open_pair(
    library: Path, name: str, packed_OP: Array, I: int
) -> list[onnxruntime.InferenceSession]:
    """Return sessions of the stock operator and of ours for the same rows."""
    stock = make_stock(name, packed_OP, I)
    ours = make_sparse(name, split(KINDS[name], packed_OP), I)

    sessions = []
    for node, arrays in (stock, ours):
        model = make_model([node], arrays, I)
        sessions.append(open_session(model, library))
    return sessions


def _draw_rows(generator: np.random.Generator, name: str, O: int, I: int, sparsity: float) -> Array:
    weight_OI = generator.standard_normal((O, I), dtype=np.float32)
    draw_OI = generator.random((O, I), dtype=np.float32)
    weight_OI[draw_OI < sparsity] = 0
    return quants.load(name).quantize(weight_OI)


def _draw_exact_inputs(generator: np.random.Generator, tokens: int, I: int) -> Array:
    """Return inputs that are whole steps of their quant block: 8 bits represent them exactly."""
    code_TGS = generator.integers(-126, 127, (tokens, I // 32, 32)).astype(np.float32)
    code_TGS[:, :, 0] = 127  # the largest code of each quant block gives its step

    exponent_TG1 = generator.integers(-4, 3, (tokens, I // 32, 1))
    step_TG1 = np.exp2(exponent_TG1).astype(np.float32)
    input_TGS = code_TGS * step_TG1
    return input_TGS.reshape(1, tokens, I)


def _speedups(library: Path, name: str) -> dict[str, float]:
    O, I = _SPEED_SHAPE
    generator = np.random.default_rng(0)
    input_BTI = generator.standard_normal((1, 1, I), dtype=np.float32)

    found = {}
    for sparsity in _SPARSITIES:
        # A few random rows over and over: drawing all of them takes longer than the measurement.
        few_OP = _draw_rows(generator, name, O // 16, I, sparsity)
        sessions = _open_pair(library, name, np.tile(few_OP, (16, 1)), I)

        ratios = [_ratio(sessions, {"x": input_BTI}) for _ in range(_ROUNDS)]
        found[f"{sparsity:.1f}"] = median(ratios)
    return found


def _ratio(sessions: Sequence[onnxruntime.InferenceSession], feeds: Mapping[str, Array]) -> float:
    times = []
    for session in sessions:
        start = time.thread_time()
        session.run(None, feeds)
        times.append(time.thread_time() - start)
    stock, ours = times
    return stock / ours


def _instruction_set(library: Path) -> str:
    function = ctypes.CDLL(str(library)).rac_instruction_set
    function.restype = ctypes.c_char_p
    return str(function().decode())


if __name__ == "__main__":
    main()
