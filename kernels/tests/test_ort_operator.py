"""The operator under stock onnxruntime: products, threads, shapes, and matrices that lie."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import racdeploy_kernels
from kernels.tests.support.compiling import build
from racdeploy import quant as quants
from racdeploy.sparse_kernels import LAYOUT_VERSION
from racdeploy_kernels import ort_trial
from racdeploy_kernels.ort_trial import compare, make_model, make_sparse, open_session
from racdeploy_kernels.sparse_matrix import (
    KERNEL_FORMATS,
    SLACK_BYTES,
    SparseMatrix,
    to_sparse,
)

QUANTS = ("matmulnbits_8", "matmulnbits_4", "f16")
SOURCES = Path(__file__).parents[1] / "sources"
Array = np.ndarray


@pytest.fixture(scope="module")
def library() -> Path:
    return build("test_operator")


@pytest.fixture(params=("portable", "avx2", "avx_vnni", "avx512"))
def kernels(request: pytest.FixtureRequest, library: Path) -> Iterator[str]:
    """Let the operator use the kernels of each instruction set that this processor has."""
    use = ctypes.CDLL(str(library)).rac_use_instruction_set
    if not use(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    use(b"")


def draw_rows(quant: str, O: int, I: int, sparsity: float, seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    weight_OI = generator.standard_normal((O, I)).astype(np.float32)
    weight_OI[generator.random((O, I)) < sparsity] = 0
    return quants.load(quant).quantize(weight_OI)


def graph_of(
    quant: str,
    matrix: SparseMatrix,
    O: int,
    I: int,
    /,
    version: int = LAYOUT_VERSION,
    **attributes: int,
) -> bytes:
    node, parts = make_sparse(quant, matrix, I, **({"O": O} | attributes))
    return make_model([node], parts, I, version)


def rounded(quant: str, x_BTI: Array) -> Array:
    """Return inputs as ggml rounds them: to half precision, or to 8 bits with a scale for each 32.

    Inputs within 1e-3 of the middle between two codes were moved off it: instruction sets round
    those differently.
    """
    if quant == "f16":
        return x_BTI.astype(np.float16).astype(np.float64)
    blocks = x_BTI.reshape(*x_BTI.shape[:-1], -1, 32)
    most = np.abs(blocks).max(axis=-1, keepdims=True)
    codes = np.rint(blocks * (np.float32(127) / most))
    return (codes * (most / np.float32(127)).astype(np.float16).astype(np.float64)).reshape(
        x_BTI.shape
    )


def draw_inputs(shape: tuple[int, ...]) -> Array:
    x_BTI = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    blocks = x_BTI.reshape(*shape[:-1], -1, 32)
    place = blocks / np.abs(blocks).max(axis=-1, keepdims=True) * 127
    near = np.abs(np.abs(place - np.trunc(place)) - 0.5) < 1e-3
    blocks[near] *= np.float32(0.99)
    return x_BTI


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(
    ("O", "I", "sparsity"),
    [(64, 256, 0.5), (100, 576, 0.5), (7, 1056, 0.7), (33, 32, 1.0), (256, 2048, 0.0)],
)
def test_products_are_those_of_the_same_arithmetic(
    kernels: str, library: Path, quant: str, O: int, I: int, sparsity: float
) -> None:
    """Within 1e-6 of the largest: at most 2048 products, in float32 by lanes and in float64."""
    packed_OP = draw_rows(quant, O, I, sparsity)
    session = open_session(
        graph_of(quant, to_sparse(KERNEL_FORMATS[quant], packed_OP), O, I), library
    )
    weight_OI = quants.load(quant).dequantize(packed_OP, I).astype(np.float64)
    for shape in ((1, 1, I), (2, 3, I), (1, 37, I)):
        x_BTI = draw_inputs(shape)
        expected_BTO = rounded(quant, x_BTI) @ weight_OI.T
        found_BTO = session.run(None, {"x": x_BTI})[0]
        assert expected_BTO.shape == found_BTO.shape
        assert np.abs(expected_BTO - found_BTO).max() <= 1e-6 * np.abs(expected_BTO).max()


def test_the_trial_finds_the_operator_right(kernels: str, library: Path) -> None:
    """It differs from the stock operator by the order of float32 sums, and by nothing else."""
    difference, refusal = compare(library)
    assert refusal == ""
    assert 0 < difference <= 1e-6


def test_an_inexact_stock_operator_refuses_no_exact_one() -> None:
    """As onnxruntime's is on AArch64; who differs from both is refused, and who is no number."""
    exact_BTO = np.array([[[1.0, -2.0]]])
    stock_BTO = exact_BTO * 1.01
    assert ort_trial._judge(stock_BTO, exact_BTO, exact_BTO) == (0.0, "")
    assert ort_trial._judge(stock_BTO, exact_BTO, stock_BTO) == (0.0, "")
    for wrong_BTO in (exact_BTO * 1.1, exact_BTO * np.nan):
        _, problem = ort_trial._judge(stock_BTO, exact_BTO, wrong_BTO)
        assert "off exact products and the stock operator, which is inexact" in problem


def test_an_exact_stock_operator_is_who_to_equal() -> None:
    """As on x86-64: to be as near the exact product on its other side is not enough."""
    exact_BTO = np.array([[[1.0, -2.0]]])
    stock_BTO, found_BTO = exact_BTO * (1 + 0.9e-6), exact_BTO * (1 - 0.9e-6)
    difference, problem = ort_trial._judge(stock_BTO, exact_BTO, found_BTO)
    assert difference == pytest.approx(1.8e-6, rel=1e-3)
    assert problem == "it is 1.8e-06 of the maximum off the stock operator"


@pytest.mark.parametrize("quant", QUANTS)
def test_threads_and_batches_change_no_bit(kernels: str, library: Path, quant: str) -> None:
    """One thread and three; all tokens at once, more than one pass holds, and one by one."""
    O, I = 96, 512
    graph = graph_of(quant, to_sparse(KERNEL_FORMATS[quant], draw_rows(quant, O, I, 0.6)), O, I)
    one, three = (open_session(graph, library, threads) for threads in (1, 3))
    x_BTI = draw_inputs((1, 1100, I))
    together = one.run(None, {"x": x_BTI})[0]
    np.testing.assert_array_equal(together, three.run(None, {"x": x_BTI})[0])
    for token in (0, 511, 1023, 1024, 1099):
        alone = one.run(None, {"x": x_BTI[:, token : token + 1]})[0]
        np.testing.assert_allclose(
            together[:, token], alone[:, 0], rtol=0, atol=1e-6 * np.abs(together).max()
        )


def test_the_trial_has_a_verdict_where_nothing_was_in_the_way(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every format on one thread; none on two whose time other programs took."""
    monkeypatch.setattr(ort_trial, "_SPEED_SHAPE", (128, 256))
    monkeypatch.setattr(ort_trial, "weights_bytes", lambda: 1 << 17)
    monkeypatch.setattr(ort_trial, "_MIN_S", 0.0)
    monkeypatch.setattr(ort_trial, "_MAX_S", 0.1)
    monkeypatch.setattr(ort_trial, "_BUSY_SHARE", 10.0)
    (verdict,) = ort_trial._measure(library, (1, 2))
    assert verdict.threads == 1
    assert sorted(verdict.speedups) == ["f16", "q4_0", "q8_0"]
    assert all(min(speedups.values()) > 0 for speedups in verdict.speedups.values())

    monkeypatch.setattr(ort_trial, "_BUSY_SHARE", 0.0)
    assert [each.threads for each in ort_trial._measure(library, (1, 2))] == [1, 2]


def test_no_tokens_and_wrong_inputs(library: Path) -> None:
    """Nothing in, nothing out; inputs of another length are an error of onnxruntime."""
    matrix = to_sparse(KERNEL_FORMATS["matmulnbits_8"], draw_rows("matmulnbits_8", 8, 64, 0.5))
    session = open_session(graph_of("matmulnbits_8", matrix, 8, 64), library)
    assert session.run(None, {"x": np.zeros((1, 0, 64), np.float32)})[0].shape == (1, 0, 8)
    node, parts = make_sparse("matmulnbits_8", matrix, 64)
    open_input = make_model([node], parts, 96)
    with pytest.raises(Exception, match="the last dimension of X is not I"):
        open_session(open_input, library).run(None, {"x": np.zeros((1, 1, 96), np.float32)})


def test_shapes_are_inferred(library: Path) -> None:
    """A session knows the shape of the output, as it does for its own operators."""
    matrix = to_sparse(KERNEL_FORMATS["matmulnbits_8"], draw_rows("matmulnbits_8", 8, 64, 0.5))
    (output,) = open_session(graph_of("matmulnbits_8", matrix, 8, 64), library).get_outputs()
    assert output.shape == ["open0", "open1", 8]


def _replace(**parts: Array) -> Callable[[SparseMatrix], SparseMatrix]:
    return lambda matrix: SparseMatrix(**({key: getattr(matrix, key) for key in PARTS} | parts))


def _edit(part: str, change: Callable[[Array], object]) -> Callable[[SparseMatrix], SparseMatrix]:
    def edit(matrix: SparseMatrix) -> SparseMatrix:
        changed = getattr(matrix, part).copy()
        change(changed)
        return SparseMatrix(**({key: getattr(matrix, key) for key in PARTS} | {part: changed}))

    return edit


PARTS = ("heads_OP", "values", "offsets")
HOSTILE: dict[str, Callable[[SparseMatrix], SparseMatrix]] = {
    "a few bits more in a mask": _edit(
        "heads_OP", lambda heads: heads[3].__setitem__([20, 40], 255)
    ),
    "all bits": _edit("heads_OP", lambda heads: heads.fill(255)),
    "bits behind the row": _edit("heads_OP", lambda heads: heads[:, -1].fill(128)),
    "values cut": lambda matrix: SparseMatrix(
        matrix.heads_OP, matrix.values[:-200], matrix.offsets
    ),
    "no values": _replace(values=np.zeros(0, np.uint8)),
    "no slack": lambda matrix: SparseMatrix(
        matrix.heads_OP, matrix.values[:-SLACK_BYTES], matrix.offsets
    ),
    "heads cut": lambda matrix: SparseMatrix(matrix.heads_OP[:-1], matrix.values, matrix.offsets),
    "offsets cut": lambda matrix: SparseMatrix(matrix.heads_OP, matrix.values, matrix.offsets[:-1]),
    "offsets that descend": _edit("offsets", lambda offsets: offsets.__setitem__(4, 1)),
    "a first offset below zero": _edit("offsets", lambda offsets: offsets.__setitem__(0, -4096)),
    "the largest offset": _edit("offsets", lambda offsets: offsets.__setitem__(5, 2**63 - 1)),
    "the smallest offset": _edit("offsets", lambda offsets: offsets.__setitem__(5, -(2**63))),
    "two offsets that make up for each other": _edit(
        "offsets", lambda offsets: offsets.__setitem__(5, offsets[5] + 1)
    ),
}
ATTRIBUTES = {
    "more rows": {"O": 17},
    "no rows": {"O": 0},
    "longer rows": {"I": 800},
    "rows of no blocks": {"I": 577},
    "endless rows": {"I": 2**62},
    "endless": {"O": 2**62},
    "another format": {"quant": 2},
    "a format that nobody knows": {"quant": 99},
}


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", [*HOSTILE, *ATTRIBUTES])
def test_a_matrix_that_lies_is_an_error_of_the_session(
    library: Path, quant: str, name: str
) -> None:
    """Whatever is wrong with it, no product is ever computed."""
    matrix = to_sparse(KERNEL_FORMATS[quant], draw_rows(quant, 16, 576, 0.5))
    if name == "another format" and quant == "matmulnbits_4":
        pytest.skip("that is the format of this matrix")
    changed = HOSTILE[name](matrix) if name in HOSTILE else matrix
    open_session(graph_of(quant, matrix, 16, 576), library)
    with pytest.raises(Exception, match="SparseMatMul: "):
        open_session(graph_of(quant, changed, 16, 576, **ATTRIBUTES.get(name, {})), library)


def test_a_graph_of_an_earlier_layout_is_refused(library: Path) -> None:
    """Its masks fit as well, and mean other weights."""
    matrix = to_sparse(KERNEL_FORMATS["matmulnbits_8"], draw_rows("matmulnbits_8", 16, 256, 0.5))
    with pytest.raises(Exception, match="SparseMatMul"):
        open_session(
            graph_of("matmulnbits_8", matrix, 16, 256, version=LAYOUT_VERSION - 1), library
        )


def test_the_layout_is_that_of_the_header() -> None:
    """What is written is what the kernels read, and what the door asks for."""
    assert racdeploy_kernels.LAYOUT_VERSION == LAYOUT_VERSION
    assert f"layout = {LAYOUT_VERSION};" in (SOURCES / "sparse_matrix.h").read_text(
        encoding="utf-8"
    )


def test_a_matrix_that_is_no_constant_is_refused(library: Path) -> None:
    """Its parts as inputs of the graph could change from run to run."""
    matrix = to_sparse(KERNEL_FORMATS["matmulnbits_8"], draw_rows("matmulnbits_8", 16, 64, 0.5))
    inputs = ("x", "x", "values", "offsets")
    node, _ = make_sparse("matmulnbits_8", matrix, 64)
    node.input[:] = inputs
    parts = {"values": matrix.values, "offsets": matrix.offsets}
    with pytest.raises(Exception, match="Type Error|must be constant"):
        open_session(make_model([node], parts, 64), library)


def test_sessions_without_the_operator_refuse_the_graph() -> None:
    """Nothing else is computed in its place."""
    matrix = to_sparse(KERNEL_FORMATS["matmulnbits_8"], draw_rows("matmulnbits_8", 16, 64, 0.5))
    with pytest.raises(Exception, match="racdeploy"):
        onnxruntime.InferenceSession(
            graph_of("matmulnbits_8", matrix, 16, 64), providers=["CPUExecutionProvider"]
        )


def test_places_and_signatures_are_those_of_the_header() -> None:
    """Compared by a compiler where the header is installed."""
    header = Path("/usr/include/onnxruntime/onnxruntime_c_api.h")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not header.is_file() or compiler is None:
        pytest.skip("needs g++ and the package libonnxruntime-dev")
    command = [
        compiler,
        "-std=c++17",
        "-fsyntax-only",
        "-Wno-invalid-offsetof",
        f"-I{header.parent}",
        f"-I{SOURCES}",
    ]
    subprocess.run([*command, str(Path(__file__).with_name("onnxruntime_header.cpp"))], check=True)
