"""The proof of the operator, in a process of its own: LIBRARY → one line of JSON, see ``racdeploy.accel.onnxruntime``.

Right: products of random sparse matrices against stock MatMulNBits and MatMul, with inputs that neither of them has to
round, so that what is left is the rounding of float32 sums. Faster: one token, processor time of one thread,
alternating with the stock operator, medians.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from racdeploy import quant as quants
from racdeploy.accel.onnx_bytes import Node, model_bytes
from racdeploy.accel.onnxruntime import Proof
from racdeploy.packing.sparse_matrix import LAYOUT, kind_of, split

QUANTS = {
    "matmulnbits_8": "q8_0",
    "matmulnbits_4": "q4_0",
    "f16": "f16",
}  # the name of the same codes in ggml
_SHAPES = ((64, 256), (100, 576), (7, 1056), (33, 32), (256, 2048))
_TOKENS = (1, 2, 5, 37)
_TOLERANCE = 1e-6  # of the largest output: both sum at most 2048 products in float32
_SPEED_SHAPE = (4096, 8192)  # beyond most caches
_SPARSITIES = (0.5, 0.6, 0.7)
_ROUNDS = 15
Array = NDArray[Any]


def main() -> None:
    """Print the proof of one library."""
    library = Path(sys.argv[1])
    onnxruntime.set_default_logger_severity(3)
    refusal = next(_failures(library), "")
    speedups = (
        {}
        if refusal
        else {ggml_name: _speedups(library, name) for name, ggml_name in QUANTS.items()}
    )
    print(json.dumps(asdict(Proof(refusal, _instruction_set(library), speedups))))


def example(name: str, packed_OP: Array, I: int) -> tuple[bytes, bytes]:
    """Return a graph of the stock operator and one of ours, for packed rows of a number format."""
    quant, O = quants.load(name), len(packed_OP)
    kind = kind_of(quant)
    assert kind is not None
    matrix = split(kind, packed_OP)
    parts: dict[str, Array] = {
        "heads": matrix.heads_OP,
        "values": matrix.values,
        "offsets": matrix.offsets,
    }
    ours = Node(
        "racdeploy",
        "SparseMatMul",
        ("x", *parts),
        "y",
        {"I": I, "O": O, "quant": kind.ggml_type},
        LAYOUT,
    )
    stock, arrays = _stock(name, packed_OP, I)
    return model_bytes([stock], arrays, {"x": I}), model_bytes([ours], parts, {"x": I})


def _stock(name: str, packed_OP: Array, I: int) -> tuple[Node, dict[str, Array]]:
    quant, O = quants.load(name), len(packed_OP)
    if name == "f16":  # as onnxruntime holds it: float32, inputs first
        return Node("", "MatMul", ("x", "w"), "y", {}), {
            "w": np.ascontiguousarray(quant.dequantize(packed_OP, I).T)
        }
    bits = int(quant.BITS)
    code_OP, scale_OP = np.split(packed_OP, [I * bits // 8], axis=1)
    scales = np.ascontiguousarray(scale_OP).view("<f2").astype(np.float32)
    arrays = {"codes": np.ascontiguousarray(code_OP).reshape(O, I // 32, -1), "scales": scales}
    attributes = {"K": I, "N": O, "bits": bits, "block_size": 32, "accuracy_level": 4}
    return Node("com.microsoft", "MatMulNBits", ("x", "codes", "scales"), "y", attributes), arrays


def open_session(graph: bytes, library: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """Load a graph that may hold the operator."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # another session is measured meanwhile
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _failures(library: Path) -> Iterator[str]:
    generator = np.random.default_rng(0)
    for name in QUANTS:
        for O, I in _SHAPES:
            sparsity = generator.choice([0.3, 0.5, 0.7, 1.0])
            stock, ours = (
                open_session(graph, library)
                for graph in example(name, _rows(generator, name, O, I, sparsity), I)
            )
            for tokens in _TOKENS:
                feeds = {"x": _exact_inputs(generator, tokens, I)}
                expected, found = stock.run(None, feeds)[0], ours.run(None, feeds)[0]
                error = np.abs(expected - found).max() / max(float(np.abs(expected).max()), 1e-30)
                if found.shape != expected.shape or not error <= _TOLERANCE:
                    yield f"{name}, {O} × {I}, {tokens} tokens: it is {error:.1e} of the maximum off the stock operator"


def _rows(generator: np.random.Generator, name: str, O: int, I: int, sparsity: float) -> Array:
    weight_OI = generator.standard_normal((O, I), dtype=np.float32)
    weight_OI[generator.random((O, I), dtype=np.float32) < sparsity] = 0
    return quants.load(name).quantize(weight_OI)


def _exact_inputs(generator: np.random.Generator, tokens: int, I: int) -> Array:
    """Return inputs that are whole steps of their block: 8 bits and half precision hold them exactly."""
    code_TGS = generator.integers(-126, 127, (tokens, I // 32, 32)).astype(np.float32)
    code_TGS[:, :, 0] = 127
    step_TG1 = np.exp2(generator.integers(-4, 3, (tokens, I // 32, 1))).astype(np.float32)
    return (code_TGS * step_TG1).reshape(1, tokens, I)


def _speedups(library: Path, name: str) -> dict[str, float]:
    O, I = _SPEED_SHAPE
    generator = np.random.default_rng(0)
    x = {"x": generator.standard_normal((1, 1, I), dtype=np.float32)}
    found = {}
    for sparsity in _SPARSITIES:
        rows = np.tile(_rows(generator, name, O // 16, I, sparsity), (16, 1))
        sessions = [open_session(graph, library) for graph in example(name, rows, I)]
        found[f"{sparsity:.1f}"] = median(_ratio(sessions, x) for _ in range(_ROUNDS))
    return found


def _ratio(sessions: list[onnxruntime.InferenceSession], feeds: Mapping[str, Array]) -> float:
    times = []
    for session in sessions:
        begun = time.thread_time()
        session.run(None, feeds)
        times.append(time.thread_time() - begun)
    return times[0] / times[1]


def _instruction_set(library: Path) -> str:
    function = ctypes.CDLL(str(library)).rac_instruction_set
    function.restype = ctypes.c_char_p
    return str(function().decode())


if __name__ == "__main__":
    main()
