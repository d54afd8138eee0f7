"""The trial of the operator, in its own process: LIBRARY → its proof as one line of JSON.

Right: random products against stock MatMulNBits and MatMul, with inputs that neither has to round,
so that only the rounding of float32 sums is left. Faster: one token, processor time of one thread,
alternating with the stock operator, medians.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime
from numpy.random import Generator
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from racdeploy import quant as quants
from racdeploy.accel.ggml_plugin import NAMES
from racdeploy.accel.proof import Proof
from racdeploy.packing.sparse_matrix import KINDS, LAYOUT, OPERATOR_DOMAIN, SparseMatrix, split

_SHAPES = ((64, 256), (100, 576), (7, 1056), (33, 32), (256, 2048))
_TOKENS = (1, 2, 5, 37)
_TOLERANCE = 1e-6  # of the largest output: both sum at most 2048 products in float32
_SPEED_SHAPE = (4096, 8192)  # beyond most caches
_SPARSITIES = (0.5, 0.6, 0.7)
_ROUNDS = 15
Array = NDArray[Any]
Product = tuple[onnx.NodeProto, dict[str, Array]]


def main() -> None:
    """Print the proof of one library."""
    library = Path(sys.argv[1])
    onnxruntime.set_default_logger_severity(3)

    difference, refusal = compare(library)
    kernels = _instruction_set(library)

    speedups: dict[str, dict[str, float]] = {}
    if not refusal:
        for name, kind in KINDS.items():
            speedups[NAMES[kind.ggml_type]] = _speedups(library, name)

    proof = Proof(refusal, "", kernels, difference, speedups)
    print(json.dumps(asdict(proof)))


def make_stock(name: str, packed_OP: Array, I: int, number: int = 0) -> Product:
    """Return a node of the stock operator for packed rows, and its initializers."""
    quant = quants.load(name)
    if name == "f16":  # as onnxruntime keeps it: float32, inputs first
        weight_OI = quant.dequantize(packed_OP, I)
        return _make_product(number, "MatMul", "", {"weight": weight_OI.T})

    O = len(packed_OP)
    bits = int(quant.BITS)

    code_OP, scale_OP = np.split(packed_OP, [I * bits // 8], axis=1)
    code_OGP = code_OP.reshape(O, I // 32, -1)
    scale_OG = np.ascontiguousarray(scale_OP).view("<f2").astype(np.float32)
    parts = {"codes": code_OGP, "scales": scale_OG}

    attributes = {"K": I, "N": O, "bits": bits, "block_size": 32, "accuracy_level": 4}
    return _make_product(number, "MatMulNBits", "com.microsoft", parts, **attributes)


def make_sparse(
    name: str, matrix: SparseMatrix, I: int, number: int = 0, /, **attributes: int
) -> Product:
    """Return a node of our operator and its initializers; ``attributes`` override the matrix's."""
    parts: dict[str, Array] = {"heads": matrix.heads_OP, "values": matrix.values}
    parts["offsets"] = matrix.offsets
    own = {"I": I, "O": len(matrix.heads_OP), "quant": KINDS[name].ggml_type}
    return _make_product(number, "SparseMatMul", OPERATOR_DOMAIN, parts, **own | attributes)


def _make_product(
    number: int, operator: str, domain: str, parts: Mapping[str, Array], **attributes: int
) -> Product:
    arrays = {f"{name}{number}": np.ascontiguousarray(part) for name, part in parts.items()}
    outputs = [f"y{number}"]
    node = helper.make_node(operator, ["x", *arrays], outputs, domain=domain, **attributes)
    return node, arrays


def make_model(
    nodes: Sequence[onnx.NodeProto], arrays: Mapping[str, Array], I: int, version: int = LAYOUT
) -> bytes:
    """Return a model of those operators on one input ``x`` [any, any, I]; all are outputs."""
    # Versions that every onnxruntime with the operator's interface reads.
    outputs = ", ".join(f"float[] {node.output[0]}" for node in nodes)
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": 17, "com.microsoft": 1, "racdeploy": {version}]>'
        f"graph (float[open0, open1, {I}] x) => ({outputs}) {{}}"
    )

    model.graph.node.extend(nodes)

    for name, values in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
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
    for name, (O, I) in product(KINDS, _SHAPES):
        sparsity = generator.choice([0.3, 0.5, 0.7, 1.0])
        packed_OP = _draw_rows(generator, name, O, I, sparsity)
        stock, ours = _open_pair(library, name, packed_OP, I)

        for tokens in _TOKENS:
            feeds = {"x": _draw_exact_inputs(generator, tokens, I)}
            (expected_BTO,) = stock.run(None, feeds)
            (found_BTO,) = ours.run(None, feeds)

            difference, problem = _judge(expected_BTO, found_BTO)
            largest = max(largest, difference)
            if problem:
                return largest, f"{name}, {O} × {I}, {tokens} tokens: {problem}"

    return largest, ""


def _judge(expected_BTO: Array, found_BTO: Array) -> tuple[float, str]:
    if found_BTO.shape != expected_BTO.shape:
        return 0.0, f"its shape is {found_BTO.shape}"

    error = np.abs(expected_BTO - found_BTO).max()
    largest = np.abs(expected_BTO).max()
    difference = float(error / max(largest, 1e-30))

    if difference <= _TOLERANCE:
        return difference, ""

    return difference, f"it is {difference:.1e} of the maximum off the stock operator"


def _open_pair(
    library: Path, name: str, packed_OP: Array, I: int
) -> list[onnxruntime.InferenceSession]:
    stock = make_stock(name, packed_OP, I)
    ours = make_sparse(name, split(KINDS[name], packed_OP), I)
    models = [make_model([node], arrays, I) for node, arrays in (stock, ours)]
    return [open_session(model, library) for model in models]


def _draw_rows(generator: Generator, name: str, O: int, I: int, sparsity: float) -> Array:
    weight_OI = generator.standard_normal((O, I), dtype=np.float32)
    draw_OI = generator.random((O, I), dtype=np.float32)
    weight_OI[draw_OI < sparsity] = 0
    return quants.load(name).quantize(weight_OI)


def _draw_exact_inputs(generator: Generator, tokens: int, I: int) -> Array:
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
        packed_OP = np.tile(few_OP, (16, 1))
        sessions = _open_pair(library, name, packed_OP, I)

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
