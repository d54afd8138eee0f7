"""The sparse kernels: what packing promises, and products compared with ggml's own C code."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.sparse_kernels import (
    PATTERNS,
    QUANTS,
    SLACK_BYTES,
    Packed,
    SparseKernels,
    build_kernels,
)

INSTRUCTION_SETS = ("portable", "avx2", "avx512")


@pytest.fixture(scope="module")
def kernels() -> SparseKernels:
    return SparseKernels(build_kernels())


@pytest.fixture(params=INSTRUCTION_SETS)
def chosen(request: pytest.FixtureRequest, kernels: SparseKernels) -> SparseKernels:
    """The kernels of each instruction set that this processor has."""
    if not kernels.use(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return kernels


def draw_blocks(quant: str, rows: int, columns: int, sparsity: float, seed: int = 0) -> np.ndarray:
    """Return random weights in ggml's blocks, uint8 [rows, row bytes], as gguf-py makes them."""
    generator = np.random.default_rng(seed)
    weight_OI = generator.standard_normal((rows, columns)).astype(np.float32)
    weight_OI[generator.random((rows, columns)) < sparsity] = 0
    return np.ascontiguousarray(
        quants.quantize(weight_OI, GGMLQuantizationType[quant.upper()]).view(np.uint8)
    )


def draw_two_of_four(rows: int, columns: int) -> np.ndarray:
    generator = np.random.default_rng(1)
    weight_OI = generator.standard_normal((rows, columns)).astype(np.float32)
    order = np.argsort(generator.random((rows, columns // 4, 4)), axis=2)
    weight_OI[(order < 2).reshape(rows, columns)] = 0
    weight_OI[0, :8] = 0  # fewer than two are left: the pattern stores zeros
    return np.ascontiguousarray(
        quants.quantize(weight_OI, GGMLQuantizationType.Q8_0).view(np.uint8)
    )


def dequantize(quant: str, blocks: np.ndarray) -> np.ndarray:
    return quants.dequantize(blocks, GGMLQuantizationType[quant.upper()]).astype(np.float64)


@settings(max_examples=40)
@given(
    quant=st.sampled_from(list(QUANTS)),
    rows=st.integers(1, 19),
    columns=st.integers(1, 40).map(lambda blocks: 32 * blocks),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.97, 1.0]),
    cut=st.integers(0, 19),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpacking_restores_every_byte(
    kernels: SparseKernels,
    quant: str,
    rows: int,
    columns: int,
    sparsity: float,
    cut: int,
    seed: int,
) -> None:
    """Packing and unpacking is the identity, and every instruction set packs the same bytes."""
    blocks = draw_blocks(quant, rows, columns, sparsity, seed)
    kernels.use("portable")
    expected = kernels.pack(quant, blocks, columns)
    for instruction_set in INSTRUCTION_SETS:
        if not kernels.use(instruction_set):
            continue
        packed = kernels.pack(quant, blocks, columns, cut=min(cut, rows))
        assert packed.values.tobytes() == expected.values.tobytes()
        assert packed.heads.tobytes() == expected.heads.tobytes()
        assert kernels.valid(packed)
        assert kernels.unpack(packed).tobytes() == blocks.tobytes()


def test_two_of_four_is_found_and_restored(chosen: SparseKernels) -> None:
    """A 2:4 matrix packs with a fixed stride where the kernels want it, and comes back whole."""
    blocks = draw_two_of_four(5, 384)
    packed = chosen.pack("q8_0", blocks, 384, "two_of_four")
    assert set(np.diff(packed.offsets)) == {192}
    assert chosen.valid(packed)
    assert chosen.unpack(packed).tobytes() == blocks.tobytes()
    assert chosen.wanted_pattern("q8_0", blocks, 384) == chosen.preferred_pattern()
    unstructured = draw_blocks("q8_0", 5, 384, 0.5)
    assert chosen.wanted_pattern("q8_0", unstructured, 384) == "unstructured"


@pytest.mark.parametrize("quant", list(QUANTS))
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16, 45])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_products_equal_the_weights_times_the_rounded_inputs(
    chosen: SparseKernels, quant: str, tokens: int, sparsity: float
) -> None:
    """Exact for the stored weights and ggml's rounded inputs, to 1e-6 of the largest."""
    rows, columns = 37, 32 * 27
    blocks = draw_blocks(quant, rows, columns, sparsity, seed=tokens)
    activation_TI = draw_activations(tokens, columns)
    expected_TO = round_inputs(quant, activation_TI) @ dequantize(quant, blocks).T
    output_TO = chosen.multiply(chosen.pack(quant, blocks, columns), activation_TI, cut=11)
    # 864 float32 additions of partial sums err by less than 864 * 2^-24 of their size, and signs
    # cancel most of it.
    np.testing.assert_allclose(
        output_TO, expected_TO, rtol=0, atol=1e-6 * np.abs(expected_TO).max()
    )


@pytest.mark.parametrize("tokens", [1, 5])
def test_two_of_four_products(chosen: SparseKernels, tokens: int) -> None:
    blocks = draw_two_of_four(21, 640)
    codes = blocks.reshape(21, -1, 34)[:, :, 2:]
    codes[codes == 127] = 128  # -128, the code that has no positive twin
    activation_TI = draw_activations(tokens, 640)
    expected_TO = round_inputs("q8_0", activation_TI) @ dequantize("q8_0", blocks).T
    output_TO = chosen.multiply(
        chosen.pack("q8_0", blocks, 640, "two_of_four"), activation_TI, cut=8
    )
    np.testing.assert_allclose(
        output_TO, expected_TO, rtol=0, atol=1e-6 * np.abs(expected_TO).max()
    )


def test_extreme_codes_multiply_exactly(chosen: SparseKernels) -> None:
    """Codes of -128 and 127 with inputs at both ends do not saturate or overflow."""
    rows, columns = 16, 512
    blocks = np.zeros((rows, columns // 32, 34), np.uint8)
    blocks[:, :, :2] = np.full((rows, columns // 32, 1), 1.0, np.float16).view(np.uint8)
    blocks[::2, :, 2:] = 0x80
    blocks[1::2, :, 2:] = 0x7F
    blocks = blocks.reshape(rows, -1)
    for sign in (-1, 1):
        activation_TI = np.full((3, columns), np.float32(sign * 127))
        expected_TO = activation_TI.astype(np.float64) @ dequantize("q8_0", blocks).T
        output_TO = chosen.multiply(chosen.pack("q8_0", blocks, columns), activation_TI)
        np.testing.assert_allclose(output_TO, expected_TO, rtol=1e-6)


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_inputs_are_rounded_as_ggml_rounds_them(chosen: SparseKernels, quant: str) -> None:
    """Codes and scales of the workspace are those of ggml's quantize_row_q8_0 on this machine."""
    columns = 1024
    activation_TI = draw_activations(1, columns)
    activation_TI[0, 64:96] = 0
    workspace = chosen.prepare(quant, activation_TI)
    blocks = ggml_q8_0(activation_TI[0]).reshape(-1, 34)
    codes = (
        workspace[:columns].view(np.int8).reshape(-1, 4, 8, 8).swapaxes(1, 2).reshape(-1)
    )  # they lie in chunks
    scales = workspace[columns + columns // 4 + columns // 8 :][: columns // 8].view(np.float32)
    assert (codes == blocks[:, 2:].view(np.int8).reshape(-1)).all()
    assert (scales == blocks[:, :2].copy().view(np.float16).reshape(-1).astype(np.float32)).all()


def test_a_matrix_that_disagrees_with_itself_is_refused(kernels: SparseKernels) -> None:
    """Every kind of damage to a packed matrix is seen before a kernel reads it."""
    for quant in QUANTS:
        for pattern in PATTERNS if quant == "q8_0" else ("unstructured",):
            packed = (
                kernels.pack(quant, draw_two_of_four(4, 384), 384, pattern)
                if quant == "q8_0"
                else None
            )
            packed = packed or kernels.pack(quant, draw_blocks(quant, 4, 384, 0.5), 384)
            assert kernels.valid(packed)
            for name, damaged in damage(packed):
                assert not kernels.valid(damaged), f"{quant} {pattern}: {name} was not noticed"


def damage(packed: Packed) -> list[tuple[str, Packed]]:
    """Return copies, each with one thing wrong."""
    head = 48 if packed.quant in ("q8_0", "q4_0") else 32
    full, late = packed.heads.copy(), packed.heads.copy()
    full[head - 32 : head - 24] = 0xFF
    late[2 * head - 1] |= 0x80  # the second group holds 128 weights only
    beyond, shifted, negative = (packed.offsets.copy() for _ in range(3))
    beyond[-1] += 4
    shifted[1] += 4
    negative[0] = -4
    parts = {
        key: getattr(packed, key)
        for key in ("quant", "pattern", "rows", "columns", "heads", "values", "offsets")
    }
    return [
        ("a fuller mask", Packed(**{**parts, "heads": full})),
        ("a bit beyond the row", Packed(**{**parts, "heads": late})),
        ("an end beyond the values", Packed(**{**parts, "offsets": beyond})),
        ("a shifted row", Packed(**{**parts, "offsets": shifted})),
        ("a negative start", Packed(**{**parts, "offsets": negative})),
        ("values cut short", Packed(**{**parts, "values": packed.values[:-1]})),
    ]


def draw_activations(tokens: int, columns: int) -> np.ndarray:
    generator = np.random.default_rng(7)
    return (
        generator.standard_normal((tokens, columns)) * generator.uniform(0.1, 9, (tokens, 1))
    ).astype(np.float32)


def round_inputs(quant: str, activation_TI: np.ndarray) -> np.ndarray:
    """Return the inputs as ggml's CPU backend rounds them before a product, float64."""
    if quant == "f16":
        return activation_TI.astype(np.float16).astype(np.float64)
    if quant == "bf16":
        return dequantize(
            "bf16", quants.quantize(activation_TI, GGMLQuantizationType.BF16).view(np.uint8)
        )
    return np.stack([dequantize("q8_0", ggml_q8_0(row_I)[None])[0] for row_I in activation_TI])


def ggml_q8_0(activation_I: np.ndarray) -> np.ndarray:
    """Return the Q8_0 blocks that ggml of the llama-cpp-python wheel makes of a row of inputs."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle is the wheel's libggml-cpu")
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-cpu.so"))
    blocks = np.zeros(len(activation_I) // 32 * 34, np.uint8)
    pointers = (ctypes.c_void_p(activation_I.ctypes.data), ctypes.c_void_p(blocks.ctypes.data))
    library.quantize_row_q8_0(*pointers, ctypes.c_int64(len(activation_I)))
    return blocks


def test_slack_is_what_the_tests_give() -> None:
    """The slack behind the values is the one that the header asks for."""
    header = (Path(__file__).parents[2] / "racdeploy/accel/sources/sparse_matrix.h").read_text(
        encoding="utf-8"
    )
    assert f"slack_bytes = {SLACK_BYTES}" in header
