"""Q3_K and Q6_K at 2:4: packed and restored byte for byte, and products beside exact ones."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from racdeploy.quant import ggml
from tests.accel.test_kernels import INSTRUCTION_SETS, use
from tests.support.sparse_kernels import (
    K_QUANTS,
    SLACK_BYTES,
    LibraryCalls,
    Packed,
    SparseKernels,
    build_arm_kernels,
    build_kernels,
    emulate,
)

PATTERN = "two_of_four"
PACKED_BYTES = {"q3_k": 86, "q6_k": 138}  # of 256 weights
BLOCK_BYTES = {"q3_k": 110, "q6_k": 210}
SCALES = {"q3_k": slice(96, 108), "q6_k": slice(192, 208)}
PLACES = {"q3_k": 48, "q6_k": 96}  # where a packed group has them


@pytest.fixture(scope="module")
def kernels() -> SparseKernels:
    return SparseKernels(LibraryCalls(build_kernels()))


@pytest.fixture(scope="module")
def emulated() -> Iterator[dict[str, SparseKernels]]:
    """The kernels on an emulated processor, empty where there can be none."""
    if isinstance(build_arm_kernels(), str):
        yield {}
        return
    with ExitStack() as stack:
        yield {"cortex-a76": SparseKernels(stack.enter_context(emulate("cortex-a76")))}


@pytest.fixture(
    params=[(name, each) for name in ("here", "cortex-a76") for each in INSTRUCTION_SETS[name]],
    ids="-".join,
)
def chosen(
    request: pytest.FixtureRequest,
    kernels: SparseKernels,
    emulated: dict[str, SparseKernels],
) -> SparseKernels:
    """The kernels of each instruction set, on a processor that has it."""
    return use(*request.param, kernels, emulated)


def draw_blocks(quant: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Return ggml's blocks with two zeros in every four weights, and some sub-blocks of zeros."""
    generator = np.random.default_rng(seed)
    weight_OI = generator.standard_normal((rows, columns)).astype(np.float32)
    order = generator.random((rows, columns // 4, 4)).argsort(axis=2)
    np.put_along_axis(weight_OI.reshape(order.shape), order[:, :, :2], 0, axis=2)
    weight_OI.reshape(rows, -1, 16)[generator.random((rows, columns // 16)) < 0.1] = 0
    weight_OI.reshape(rows, -1, 256)[generator.random((rows, columns // 256)) < 0.1] = 0
    return ggml.quantize(GGMLQuantizationType[quant.upper()], weight_OI)


def dequantize(quant: str, blocks: np.ndarray) -> np.ndarray:
    return quants.dequantize(blocks, GGMLQuantizationType[quant.upper()]).astype(np.float64)


def assert_multiplies(
    kernels: SparseKernels, packed: Packed, blocks: np.ndarray, tokens: int
) -> None:
    """Compare with the weights times ggml's rounded inputs, to 1e-6 of the largest output."""
    generator = np.random.default_rng(3)
    activation_TI = generator.standard_normal((tokens, packed.columns)).astype(np.float32)
    activation_TI[:, :256] *= 30
    activation_TI[0, 256:512] = 0
    expected_TO = round_inputs(activation_TI) @ dequantize(packed.quant, blocks).T
    output_TO = kernels.multiply(packed, activation_TI, cut=packed.rows // 3)
    np.testing.assert_allclose(
        output_TO, expected_TO, rtol=0, atol=1e-6 * np.abs(expected_TO).max()
    )


def round_inputs(activation_TI: np.ndarray) -> np.ndarray:
    """Return the inputs as ggml's quantize_row_q8_K_ref rounds them, float64."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle is the wheel's libggml-base")
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    inputs = np.ascontiguousarray(activation_TI).reshape(-1, 256)
    blocks = np.zeros((len(inputs), 4 + 256 + 32), np.uint8)
    pointers = (ctypes.c_void_p(inputs.ctypes.data), ctypes.c_void_p(blocks.ctypes.data))
    library.quantize_row_q8_K_ref(*pointers, ctypes.c_int64(inputs.size))
    scales = blocks[:, :4].copy().view(np.float32).astype(np.float64)
    return (blocks[:, 4:260].view(np.int8) * scales).reshape(activation_TI.shape)


@pytest.mark.parametrize("quant", K_QUANTS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_products_are_those_of_the_weights_and_the_rounded_inputs(
    chosen: SparseKernels, quant: str, tokens: int
) -> None:
    """And every set of kernels finds the pattern and packs it into as many bytes."""
    blocks = draw_blocks(quant, 21, 768)
    assert chosen.wanted_pattern(quant, blocks, 768) == PATTERN
    packed = chosen.pack(quant, blocks, 768, PATTERN, cut=8)
    assert packed.offsets[-1] == 21 * 3 * PACKED_BYTES[quant]
    assert chosen.valid(packed)
    assert chosen.unpack(packed).tobytes() == blocks.tobytes()
    assert_multiplies(chosen, packed, blocks, tokens)


@settings(max_examples=60, deadline=None)
@given(
    quant=st.sampled_from(list(K_QUANTS)),
    scales=st.binary(min_size=18, max_size=18),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_block_of_the_pattern_comes_back(
    kernels: SparseKernels, quant: str, scales: bytes, seed: int
) -> None:
    """Whatever its codes, its scales and the signs of its zeros are."""
    generator = np.random.default_rng(seed)
    packed = np.frombuffer(generator.bytes(PACKED_BYTES[quant]), np.uint8).copy()
    start = PLACES[quant]
    # Third bits are cleared where two bits are 2 or 3: those codes are not for every scale.
    for code in range(16):
        for low, third in ((0, 2), (4, 6), (2, 3), (6, 7)):
            if packed[start + code] >> low & 2:
                bit = third - (0 if code < 8 else 2)
                packed[start + 16 + code % 8] &= ~(1 << bit) & 0xFF
    packed[start + 24 :] = np.frombuffer(scales, np.uint8)[: len(packed) - start - 24]

    matrix = wrap(quant, packed, PATTERN)
    assert kernels.valid(matrix)
    blocks = kernels.unpack(matrix)
    assert kernels.wanted_pattern(quant, blocks, 256) == PATTERN
    again = kernels.pack(quant, blocks, 256, PATTERN)
    assert kernels.valid(again)
    assert kernels.unpack(again).tobytes() == blocks.tobytes()


def wrap(quant: str, packed: np.ndarray, pattern: str) -> Packed:
    values = np.concatenate([packed, np.zeros(SLACK_BYTES, np.uint8)])
    offsets = np.array([0, len(packed)], np.int64)
    return Packed(quant, pattern, 1, 256, np.zeros(0, np.uint8), values, offsets)


@pytest.mark.parametrize("quant", K_QUANTS)
def test_extreme_codes_multiply_exactly(chosen: SparseKernels, quant: str) -> None:
    """The largest weights and scales with the largest inputs overflow nowhere."""
    zero, low, high = (4, 0, 7) if quant == "q3_k" else (32, 0, 63)
    codes = np.full((4, 64, 4), zero)
    codes[0, :, 1:3] = codes[2, ::2, :2] = low
    codes[1, :, 1:3] = codes[3, :, 2:] = high
    blocks = make_blocks(quant, codes.reshape(4, 256), sub_scale=0 if quant == "q3_k" else 0x80)
    packed = chosen.pack(quant, blocks, 256, PATTERN)
    assert chosen.unpack(packed).tobytes() == blocks.tobytes()

    for sign in (-1, 1):
        activation_TI = np.full((5, 256), sign, np.float32)
        expected_TO = activation_TI.astype(np.float64) @ dequantize(quant, blocks).T
        np.testing.assert_allclose(chosen.multiply(packed, activation_TI), expected_TO, rtol=1e-6)


def make_blocks(quant: str, code_RI: np.ndarray, sub_scale: int) -> np.ndarray:
    """Return a block a row with these unsigned codes, d = 1, and one byte of all scales."""
    blocks = np.zeros((len(code_RI), BLOCK_BYTES[quant]), np.uint8)
    blocks[:, SCALES[quant]] = sub_scale
    blocks[:, -2:] = np.array([1], np.float16).view(np.uint8)
    for i, code_R in enumerate(code_RI.T):
        half, quarter, lane = i // 128, i % 128 // 32, i % 32
        if quant == "q3_k":
            blocks[:, 32 + half * 32 + lane] |= ((code_R & 3) << 2 * quarter).astype(np.uint8)
            blocks[:, lane] |= (code_R >> 2 << (4 * half + quarter)).astype(np.uint8)
        else:
            low = half * 64 + quarter % 2 * 32 + lane
            blocks[:, low] |= ((code_R & 15) << quarter // 2 * 4).astype(np.uint8)
            blocks[:, 128 + half * 32 + lane] |= (code_R >> 4 << 2 * quarter).astype(np.uint8)
    return blocks


@pytest.mark.parametrize("quant", K_QUANTS)
@pytest.mark.parametrize("pattern", [PATTERN, "unstructured"])
def test_an_infinite_input_gives_no_number(chosen: SparseKernels, quant: str, pattern: str) -> None:
    """As ggml's own products do: for its token. Inputs too small for a scale are zeros there."""
    blocks = draw_blocks(quant, 17, 512)
    packed = chosen.pack(quant, blocks, 512, pattern)
    activation_TI = np.ones((6, 512), np.float32)
    activation_TI[0, 300] = -np.inf
    activation_TI[1] = 1e-40
    with np.errstate(invalid="ignore"):
        expected_TO = round_inputs(activation_TI) @ dequantize(quant, blocks).T
    assert np.isnan(expected_TO[0]).all()
    assert not expected_TO[1].any()

    for tokens in (2, 6):
        output_TO = chosen.multiply(packed, activation_TI[:tokens])
        assert not np.isfinite(output_TO[0]).any()
        np.testing.assert_allclose(output_TO[1:], expected_TO[1:tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quant", K_QUANTS)
def test_other_matrices_stay_as_they_are(chosen: SparseKernels, quant: str) -> None:
    """What is not 2:4 may still be written over what was: it is multiplied as ggml's blocks."""
    generator = np.random.default_rng(1)
    weight_OI = generator.standard_normal((3, 512)).astype(np.float32)
    blocks = ggml.quantize(GGMLQuantizationType[quant.upper()], weight_OI)
    assert chosen.wanted_pattern(quant, blocks, 512) == "unstructured"
    packed = chosen.pack(quant, blocks, 512)
    assert chosen.valid(packed)
    assert chosen.unpack(packed).tobytes() == blocks.tobytes()
    assert_multiplies(chosen, packed, blocks, 2)


@pytest.mark.parametrize("quant", K_QUANTS)
def test_a_spoilt_matrix_is_refused(kernels: SparseKernels, quant: str) -> None:
    """A code that says no places, one that belongs to zero scales, rows of another length."""
    blocks = make_blocks(quant, np.full((1, 256), 4 if quant == "q3_k" else 32), sub_scale=0x55)
    packed = kernels.pack(quant, blocks, 256, PATTERN)
    assert kernels.valid(packed)

    for two_bits in (2, 3):
        values = packed.values.copy()
        values[PLACES[quant]] |= two_bits
        values[PLACES[quant] + 16] |= 1 << 2
        assert not kernels.valid(replace(packed, values=values))

    for numbers in ({"columns": 512}, {"columns": 128}, {"rows": 2}, {"pattern": "four_of_eight"}):
        assert not kernels.valid(replace(packed, **numbers))
    assert not kernels.valid(replace(packed, values=packed.values[:-1]))
    for offsets in ([0, packed.offsets[1] - 1], [1, packed.offsets[1]]):
        assert not kernels.valid(replace(packed, offsets=np.array(offsets)))
