"""The trial of the operator, in its own process: LIBRARY → its proof as one line of JSON.

Right: random products against stock MatMulNBits and MatMul, with inputs that need no rounding, so
that only the rounding of float32 sums is left; or against exact products where the stock operator
is inexact itself: on AArch64 MatMulNBits is off by 1e-5 of the largest output with 8 bits and by
1e-2 with 4. Faster: one token on each number of threads, alternating with the stock operator, the
fastest of several runs.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime
from numpy.random import Generator
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from racdeploy import quant as quants
from racdeploy.processes.cores import available_cores
from racdeploy_kernels.ggml_plugin import NAMES
from racdeploy_kernels.proof import Proof
from racdeploy_kernels.sparse_matrix import (
    KERNEL_FORMATS,
    LAYOUT_VERSION,
    OPERATOR_DOMAIN,
    SparseMatrix,
    to_sparse,
)
from racdeploy_kernels.verdicts import ThreadVerdict, measure, thread_counts, weights_bytes

_SHAPES = ((64, 256), (100, 576), (7, 1056), (33, 32), (256, 2048))
_TOKENS = (1, 2, 5, 37)
_TOLERANCE = 1e-6  # of the largest output: both sum at most 2048 products in float32
_SPEED_SHAPE = (4096, 8192)
_DRAWN_ROWS = 128  # over and over: to draw all of them takes longer than the measurement
_SPARSITIES = (0.5, 0.6, 0.7)
_MIN_RUNS = 5
_MIN_S, _MAX_S = 0.1, 3.0  # of runs that count, and of all of both sides
_BUSY_SHARE = 0.8
Array = NDArray[Any]
Product = tuple[onnx.NodeProto, dict[str, Array]]


def main() -> None:
    """Print the proof of one library."""
    library = Path(sys.argv[1])
    onnxruntime.set_default_logger_severity(3)

    _, failure = compare(library)
    kernels = _instruction_set(library)

    verdicts = () if failure else _measure(library, thread_counts(available_cores()))

    proof = Proof(failure, "", kernels, verdicts)
    print(json.dumps(asdict(proof)))


def make_stock(name: str, packed_OP: Array, I: int, number: int = 0) -> Product:
    """Return a node of the stock operator for packed rows, and its initializers."""
    quant = quants.load(name)
    if name == "f16":  # as onnxruntime keeps it: float32, inputs first
        weight_OI = quant.dequantize(packed_OP, I)
        return _make_product(
            number,
            "MatMul",
            "",
            {"weight": weight_OI.T},
        )

    O = len(packed_OP)
    bits = int(quant.bits)

    code_OP, scale_OP = np.split(packed_OP, [I * bits // 8], axis=1)
    code_OGP = code_OP.reshape(O, I // 32, -1)
    scale_OG = np.ascontiguousarray(scale_OP).view("<f2").astype(np.float32)
    parts = {"codes": code_OGP, "scales": scale_OG}

    attributes = {"K": I, "N": O, "bits": bits, "block_size": 32, "accuracy_level": 4}
    return _make_product(
        number,
        "MatMulNBits",
        "com.microsoft",
        parts,
        **attributes,
    )


def make_sparse(
    name: str, matrix: SparseMatrix, I: int, number: int = 0, /, **attributes: int
) -> Product:
    """Return a node of our operator and its initializers; ``attributes`` override the matrix's."""
    parts: dict[str, Array] = {"heads": matrix.heads_OP, "values": matrix.values}
    parts["offsets"] = matrix.offsets
    defaults = {"I": I, "O": len(matrix.heads_OP), "quant": KERNEL_FORMATS[name].ggml_type}
    return _make_product(
        number,
        "SparseMatMul",
        OPERATOR_DOMAIN,
        parts,
        **defaults | attributes,
    )


def _make_product(
    number: int, operator: str, domain: str, parts: Mapping[str, Array], **attributes: int
) -> Product:
    arrays = {f"{name}{number}": np.ascontiguousarray(part) for name, part in parts.items()}
    outputs = [f"y{number}"]
    node = helper.make_node(
        operator,
        ["x", *arrays],
        outputs,
        domain=domain,
        **attributes,
    )
    return node, arrays


def make_model(
    nodes: Sequence[onnx.NodeProto],
    arrays: Mapping[str, Array],
    I: int,
    version: int = LAYOUT_VERSION,
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
    return onnxruntime.InferenceSession(
        graph,
        options,
        providers=["CPUExecutionProvider"],
    )


def compare(library: Path) -> tuple[float, str]:
    """Return the largest difference over the largest output, and what is wrong with it."""
    generator = np.random.default_rng(0)

    largest = 0.0
    for name, (O, I) in product(KERNEL_FORMATS, _SHAPES):
        sparsity = generator.choice([0.3, 0.5, 0.7, 1.0])
        packed_OP = _draw_rows(generator, name, O, I, sparsity)
        weight_OI = quants.load(name).dequantize(packed_OP, I).astype(np.float64)
        stock, sparse = _open_pair(library, name, packed_OP, I)

        for tokens in _TOKENS:
            feeds = {"x": _draw_exact_inputs(generator, tokens, I)}
            (expected_BTO,) = stock.run(None, feeds)
            (output_BTO,) = sparse.run(None, feeds)

            exact_BTO = feeds["x"].astype(np.float64) @ weight_OI.T
            difference, problem = _judge(expected_BTO, exact_BTO, output_BTO)
            largest = max(largest, difference)
            if problem:
                return largest, f"{name}, {O} × {I}, {tokens} tokens: {problem}"

    return largest, ""


def _judge(stock_BTO: Array, exact_BTO: Array, output_BTO: Array) -> tuple[float, str]:
    if output_BTO.shape != stock_BTO.shape:
        return 0.0, f"its shape is {output_BTO.shape}"

    difference = _difference(stock_BTO, output_BTO)
    reference = "the stock operator"

    # Skip an inexact reference: products in float64 decide.
    if _difference(exact_BTO, stock_BTO) > _TOLERANCE:
        difference = min(difference, _difference(exact_BTO, output_BTO))
        reference = "exact products and the stock operator, which is inexact"

    if difference <= _TOLERANCE:
        return difference, ""
    return difference, f"it is {difference:.1e} of the maximum off {reference}"


def _difference(expected_BTO: Array, output_BTO: Array) -> float:
    error = np.abs(expected_BTO - output_BTO).max()
    largest = np.abs(expected_BTO).max()
    return float(error / max(largest, 1e-30))


def _open_pair(
    library: Path, name: str, packed_OP: Array, I: int
) -> list[onnxruntime.InferenceSession]:
    stock = make_stock(name, packed_OP, I)
    sparse = make_sparse(name, to_sparse(KERNEL_FORMATS[name], packed_OP), I)
    models = [make_model([node], arrays, I) for node, arrays in (stock, sparse)]
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


def _measure(library: Path, counts: Sequence[int]) -> tuple[ThreadVerdict, ...]:
    size_bytes = weights_bytes() // 2  # a session takes memory several times, and seconds
    kinds = {NAMES[kind.ggml_type]: name for name, kind in KERNEL_FORMATS.items()}

    def race(quant: str, zeros: float, threads: Sequence[int]) -> list[float]:
        models = _make_models(kinds[quant], zeros, size_bytes)
        return [_speedup(models, library, count) for count in threads]

    return measure(dict.fromkeys(kinds, _SPARSITIES), counts, race)


def _make_models(name: str, sparsity: float, size_bytes: int) -> list[bytes]:
    """Return two models with ``size_bytes`` of weights: of stock operators, and of sparse ones."""
    O, I = _SPEED_SHAPE
    generator = np.random.default_rng(0)
    drawn_OP = _draw_rows(generator, name, _DRAWN_ROWS, I, sparsity)
    packed_OP = np.tile(drawn_OP, (O // _DRAWN_ROWS, 1))
    matrix = to_sparse(KERNEL_FORMATS[name], packed_OP)

    stock = _Graph(I)
    sparse = _Graph(I)
    number = 0
    while stock.size_bytes < size_bytes:
        stock.add(make_stock(name, packed_OP, I, number))
        sparse.add(make_sparse(name, matrix, I, number))
        number += 1

    return [stock.make(), sparse.make()]


class _Graph:
    """Several products, each with weights of its own."""

    def __init__(self, I: int) -> None:
        self._inputs = I
        self._nodes: list[onnx.NodeProto] = []
        self._arrays: dict[str, Array] = {}
        self.size_bytes = 0

    def add(self, product: Product) -> None:
        node, arrays = product
        self._nodes.append(node)
        self._arrays |= arrays
        self.size_bytes += sum(array.nbytes for array in arrays.values())

    def make(self) -> bytes:
        return make_model(self._nodes, self._arrays, self._inputs)


def _speedup(models: Sequence[bytes], library: Path, threads: int) -> float:
    stock, sparse = (_Fastest(model, library, threads) for model in models)

    end_s = time.perf_counter() + _MAX_S
    rounds = 0
    while rounds < _MIN_RUNS or time.perf_counter() < end_s:
        stock.run()
        sparse.run()

        rounds += 1
        if stock.well_known and sparse.well_known:
            break

    return stock.fastest_s / sparse.fastest_s


class _Fastest:
    """The fastest of some runs: whatever else the machine does only ever makes a run slower."""

    def __init__(self, model: bytes, library: Path, threads: int) -> None:
        self._session = open_session(model, library, threads)
        self._threads = threads

        (model_input,) = self._session.get_inputs()
        _, _, I = model_input.shape
        generator = np.random.default_rng(0)
        self._feeds = {"x": generator.standard_normal((1, 1, I), dtype=np.float32)}

        self._counted_s: list[float] = []

    def run(self) -> None:
        """Run once; it does not count where other programs took part of the time.

        The processor time of one thread has nothing of them in it. Several threads wait for each
        other, so there the wall counts, if all were running: who waits for another does so busily.
        """
        start_s = time.perf_counter()
        thread_s = time.thread_time()
        all_s = time.process_time()

        self._session.run(None, self._feeds)

        thread_s = time.thread_time() - thread_s
        all_s = time.process_time() - all_s
        wall_s = time.perf_counter() - start_s

        if self._threads == 1:
            self._counted_s.append(thread_s)
        elif all_s >= _BUSY_SHARE * self._threads * wall_s:
            self._counted_s.append(wall_s)

    @property
    def well_known(self) -> bool:
        enough = len(self._counted_s) >= _MIN_RUNS
        return enough and sum(self._counted_s) >= _MIN_S

    @property
    def fastest_s(self) -> float:
        """Time of the fastest run; NaN if too few runs counted."""
        if len(self._counted_s) < _MIN_RUNS:
            return math.nan
        return min(self._counted_s)


def _instruction_set(library: Path) -> str:
    function = ctypes.CDLL(str(library)).rac_instruction_set
    function.restype = ctypes.c_char_p
    return str(function().decode())


if __name__ == "__main__":
    main()
