"""The sparse kernels: what packing promises, and products compared with ggml's own C code."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.tests.support.compiling import build, explain_no_arm
from kernels.tests.support.sparse_kernels import (
    QUANTS,
    SLACK_BYTES,
    TWO_OF_FOUR,
    LibraryCalls,
    Packed,
    SparseKernels,
    emulate,
)

_OF_MACHINE = {"x86_64": ("avx2", "avx_vnni", "avx512"), "aarch64": ("neon", "neon_i8mm")}
# Processors, and the instruction sets whose kernels run on them. QEMU knows the Cortex-A76 of the
# Raspberry Pi 5, which has dot products and no matrix products.
INSTRUCTION_SETS = {
    "here": ("portable", *_OF_MACHINE.get(platform.machine(), ())),
    "max": ("portable", "neon", "neon_i8mm"),
    "cortex-a76": ("neon",),
}
_EMULATED = tuple(processor for processor in INSTRUCTION_SETS if processor != "here")


@pytest.fixture(scope="module")
def kernels() -> SparseKernels:
    return SparseKernels(LibraryCalls(build("test_kernels")))


@pytest.fixture(scope="module")
def emulated() -> Iterator[dict[str, SparseKernels]]:
    """The kernels on the emulated processors, empty where these cannot be."""
    if explain_no_arm():
        yield {}
        return
    with ExitStack() as stack:
        yield {
            processor: SparseKernels(stack.enter_context(emulate(processor)))
            for processor in _EMULATED
        }


def use(
    processor: str,
    instruction_set: str,
    kernels: SparseKernels,
    emulated: dict[str, SparseKernels],
) -> SparseKernels:
    if processor != "here" and not emulated:
        pytest.skip(explain_no_arm())
    found = kernels if processor == "here" else emulated[processor]
    if not found.use(instruction_set):
        assert processor == "here"
        pytest.skip(f"this processor has no {instruction_set}")
    return found


@pytest.fixture(
    params=[
        pytest.param(
            (name, each),
            id=f"{name}-{each}",
            marks=[] if name == "here" else pytest.mark.emulated,
        )
        for name, sets in INSTRUCTION_SETS.items()
        for each in sets
    ]
)
def chosen(
    request: pytest.FixtureRequest,
    kernels: SparseKernels,
    emulated: dict[str, SparseKernels],
) -> SparseKernels:
    """The kernels of each instruction set, on a processor that has it."""
    return use(*request.param, kernels, emulated)


@pytest.fixture
def picking(chosen: SparseKernels) -> SparseKernels:
    """Those that take 2:4."""
    if not chosen.takes_two_of_four:
        pytest.skip("these kernels pack 2:4 as any zeros")
    return chosen


def draw_blocks(quant: str, rows: int, columns: int, sparsity: float, seed: int = 0) -> np.ndarray:
    """Return random weights in ggml's blocks, uint8 [rows, row bytes], as gguf-py makes them."""
    generator = np.random.default_rng(seed)
    weight_OI = generator.standard_normal((rows, columns)).astype(np.float32)
    weight_OI[generator.random((rows, columns)) < sparsity] = 0
    return np.ascontiguousarray(
        quants.quantize(weight_OI, GGMLQuantizationType[quant.upper()]).view(np.uint8)
    )


def draw_two_of_four(quant: str, rows: int, columns: int) -> np.ndarray:
    """Return random blocks of which at most two of every four weights are not zero."""
    generator = np.random.default_rng(1)
    weight_OI = generator.standard_normal((rows, columns)).astype(np.float32)
    order = np.argsort(generator.random((rows, columns // 4, 4)), axis=2)
    weight_OI[(order < 2).reshape(rows, columns)] = 0
    weight_OI[0, :8] = 0  # fewer are left: the pattern stores zeros
    return np.ascontiguousarray(
        quants.quantize(weight_OI, GGMLQuantizationType[quant.upper()]).view(np.uint8)
    )


def dequantize(quant: str, blocks: np.ndarray) -> np.ndarray:
    return quants.dequantize(blocks, GGMLQuantizationType[quant.upper()]).astype(np.float64)


matrices = st.fixed_dictionaries(
    {
        "quant": st.sampled_from(list(QUANTS)),
        "rows": st.integers(1, 19),
        "columns": st.integers(1, 40).map(lambda blocks: 32 * blocks),
        "sparsity": st.sampled_from([0.0, 0.3, 0.5, 0.97, 1.0]),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(max_examples=40)
@given(matrix=matrices, cut=st.integers(0, 19))
def test_unpacking_restores_every_byte(
    kernels: SparseKernels, matrix: dict[str, Any], cut: int
) -> None:
    """Packing and unpacking is the identity, and every instruction set packs the same bytes."""
    kernels.use("portable")
    expected = pack_drawn(kernels, matrix, 0)
    for instruction_set in INSTRUCTION_SETS["here"]:
        if kernels.use(instruction_set):
            assert_packs(kernels, matrix, cut, expected)


@pytest.mark.emulated
@settings(max_examples=15)
@given(matrix=matrices, cut=st.integers(0, 19))
def test_unpacking_on_arm_restores_every_byte(
    kernels: SparseKernels, emulated: dict[str, SparseKernels], matrix: dict[str, Any], cut: int
) -> None:
    """And an ARM processor packs the same bytes as this one."""
    kernels.use("portable")
    expected = pack_drawn(kernels, matrix, 0)
    for instruction_set in INSTRUCTION_SETS["max"]:
        assert_packs(use("max", instruction_set, kernels, emulated), matrix, cut, expected)


def pack_drawn(kernels: SparseKernels, matrix: dict[str, Any], cut: int) -> Packed:
    rows, columns = matrix["rows"], matrix["columns"]
    blocks = draw_blocks(matrix["quant"], rows, columns, matrix["sparsity"], matrix["seed"])
    return kernels.pack(matrix["quant"], blocks, columns, cut=min(cut, rows))


def assert_packs(
    kernels: SparseKernels, matrix: dict[str, Any], cut: int, expected: Packed
) -> None:
    packed = pack_drawn(kernels, matrix, cut)
    assert packed.values.tobytes() == expected.values.tobytes()
    assert packed.heads.tobytes() == expected.heads.tobytes()
    assert kernels.valid(packed)
    assert kernels.unpack(packed).tobytes() == draw_blocks(**matrix).tobytes()


@pytest.mark.parametrize("quant", TWO_OF_FOUR)
def test_a_fixed_stride_is_restored(
    picking: SparseKernels, kernels: SparseKernels, quant: str
) -> None:
    """A 2:4 matrix packs with a fixed stride, the same everywhere, and comes back whole."""
    blocks = draw_two_of_four(quant, 5, 384)
    packed = picking.pack(quant, blocks, 384, "two_of_four", cut=2)
    assert set(np.diff(packed.offsets)) == {512 // (2 if quant == "q8_0" else 4)}  # whole groups
    assert picking.valid(packed)
    assert picking.unpack(packed).tobytes() == blocks.tobytes()

    kernels.use("portable")
    expected = kernels.pack(quant, blocks, 384, "two_of_four")
    assert packed.values.tobytes() == expected.values.tobytes()
    assert packed.heads.tobytes() == expected.heads.tobytes()


@pytest.mark.parametrize("quant", TWO_OF_FOUR)
def test_a_fixed_stride_is_found(chosen: SparseKernels, quant: str) -> None:
    """Where the kernels of this processor gain from one, and nowhere else."""
    blocks = draw_two_of_four(quant, 5, 512)
    assert chosen.wanted_pattern(quant, blocks, 512) == chosen.pattern
    for sparsity in (0.5, 0.0):
        unstructured = draw_blocks(quant, 5, 512, sparsity)
        assert chosen.wanted_pattern(quant, unstructured, 512) == "unstructured"


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_a_fixed_stride_needs_enough_values(chosen: SparseKernels, quant: str) -> None:
    """Where a row's last group is short, or most weights are zero, it would store zeros."""
    short = draw_two_of_four(quant, 5, 384)
    assert chosen.wanted_pattern(quant, short, 384) == "unstructured"
    assert chosen.wanted_pattern(quant, draw_blocks(quant, 5, 512, 0.99), 512) == "unstructured"


@pytest.mark.parametrize("quant", ["f16", "bf16"])
def test_floats_are_unstructured(chosen: SparseKernels, quant: str) -> None:
    """Whatever the pattern of their zeros."""
    blocks = draw_two_of_four(quant, 5, 512)
    assert chosen.wanted_pattern(quant, blocks, 512) == "unstructured"


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
    expected_TO = round_inputs(chosen, quant, activation_TI) @ dequantize(quant, blocks).T
    output_TO = chosen.multiply(chosen.pack(quant, blocks, columns), activation_TI, cut=11)
    # 864 float32 additions of partial sums err by less than 864 * 2^-24 of their size, and signs
    # cancel most of it.
    np.testing.assert_allclose(
        output_TO, expected_TO, rtol=0, atol=1e-6 * np.abs(expected_TO).max()
    )


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("quant", TWO_OF_FOUR)
def test_products_of_a_fixed_stride(picking: SparseKernels, quant: str, tokens: int) -> None:
    """Exact as those of any mask."""
    blocks = draw_two_of_four(quant, 21, 640)
    if quant == "q8_0":
        codes = blocks.reshape(21, -1, 34)[:, :, 2:]
        codes[codes == 127] = 128  # -128, the code that has no positive twin
    activation_TI = draw_activations(tokens, 640)
    expected_TO = round_inputs(picking, quant, activation_TI) @ dequantize(quant, blocks).T
    packed = picking.pack(quant, blocks, 640, "two_of_four")
    output_TO = picking.multiply(packed, activation_TI, cut=8)
    np.testing.assert_allclose(
        output_TO, expected_TO, rtol=0, atol=1e-6 * np.abs(expected_TO).max()
    )


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("pattern", ["unstructured", "two_of_four"])
def test_extreme_codes_multiply_exactly(chosen: SparseKernels, pattern: str, tokens: int) -> None:
    """Codes at both ends with inputs at both ends do not saturate or overflow."""
    if pattern == "two_of_four" and not chosen.takes_two_of_four:
        pytest.skip("these kernels pack 2:4 as any zeros")
    rows, columns = 16, 512
    for quant, codes, zero, low, high in (("q8_0", 32, 0, 0x80, 0x7F), ("q4_0", 16, 0x88, 0, 0xFF)):
        blocks = np.zeros((rows, columns // 32, 2 + codes), np.uint8)
        blocks[:, :, :2] = np.full((rows, columns // 32, 1), 1.0, np.float16).view(np.uint8)
        blocks[::2, :, 2:] = low
        blocks[1::2, :, 2:] = high
        if pattern == "two_of_four":
            blocks[:, :, 2::4] = blocks[:, :, 4::4] = zero
        blocks = blocks.reshape(rows, -1)
        packed = chosen.pack(quant, blocks, columns, pattern)
        for sign in (-1, 1):
            activation_TI = np.full((tokens, columns), np.float32(sign * 127))
            expected_TO = activation_TI.astype(np.float64) @ dequantize(quant, blocks).T
            output_TO = chosen.multiply(packed, activation_TI)
            np.testing.assert_allclose(output_TO, expected_TO, rtol=1e-6)


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_inputs_are_rounded_as_ggml_rounds_them(chosen: SparseKernels, quant: str) -> None:
    """Codes and scales of the workspace are those of quantize_row_q8_0 on the same processor."""
    columns = 1024
    activation_TI = draw_activations(1, columns)
    activation_TI[0, 64:96] = 0
    workspace = chosen.prepare(quant, activation_TI)
    blocks = ggml_q8_0(chosen, activation_TI[0]).reshape(-1, 34)
    codes = (
        workspace[:columns].view(np.int8).reshape(-1, 4, 8, 8).swapaxes(1, 2).reshape(-1)
    )  # they lie in chunks
    scales = workspace[columns + columns // 4 + columns // 8 :][: columns // 8].view(np.float32)
    assert (codes == blocks[:, 2:].view(np.int8).reshape(-1)).all()
    assert (scales == blocks[:, :2].copy().view(np.float16).reshape(-1).astype(np.float32)).all()


@pytest.mark.parametrize(
    ("quant", "pattern"),
    [
        *((quant, "unstructured") for quant in QUANTS),
        *((quant, "two_of_four") for quant in TWO_OF_FOUR),
    ],
)
def test_a_matrix_that_disagrees_with_itself_is_refused(
    kernels: SparseKernels, quant: str, pattern: str
) -> None:
    """Every kind of damage to a packed matrix is seen before a kernel reads it."""
    kernels.use("portable")
    packed = kernels.pack(quant, draw_two_of_four(quant, 4, 384), 384, pattern)
    assert kernels.valid(packed)
    for name, damaged in damage(packed):
        assert not kernels.valid(damaged), f"{name} was not noticed"


def test_a_pattern_belongs_to_some_formats(kernels: SparseKernels) -> None:
    """A file that claims another one is refused."""
    for quant in QUANTS:
        packed = kernels.pack(quant, draw_blocks(quant, 2, 512, 0.5), 512)
        assert not kernels.valid(replace(packed, pattern="two_of_four"))


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
    return [
        ("a fuller mask", replace(packed, heads=full)),
        ("a bit beyond the row", replace(packed, heads=late)),
        ("an end beyond the values", replace(packed, offsets=beyond)),
        ("a shifted row", replace(packed, offsets=shifted)),
        ("a negative start", replace(packed, offsets=negative)),
        ("values cut short", replace(packed, values=packed.values[:-1])),
    ]


def draw_activations(tokens: int, columns: int) -> np.ndarray:
    generator = np.random.default_rng(7)
    return (
        generator.standard_normal((tokens, columns)) * generator.uniform(0.1, 9, (tokens, 1))
    ).astype(np.float32)


def round_inputs(kernels: SparseKernels, quant: str, activation_TI: np.ndarray) -> np.ndarray:
    """Return the inputs as ggml's CPU backend rounds them before a product, float64."""
    if quant == "f16":
        return activation_TI.astype(np.float16).astype(np.float64)
    if quant == "bf16":
        return dequantize(
            "bf16", quants.quantize(activation_TI, GGMLQuantizationType.BF16).view(np.uint8)
        )
    blocks_TP = np.stack([ggml_q8_0(kernels, row_I) for row_I in activation_TI])
    return dequantize("q8_0", blocks_TP)


def ggml_q8_0(kernels: SparseKernels, activation_I: np.ndarray) -> np.ndarray:
    """Return the Q8_0 blocks that ggml makes of a row of inputs where these kernels run."""
    if kernels.are_emulated:
        return arm_q8_0(activation_I)
    llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle is the wheel's libggml-cpu")
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-cpu.so"))
    blocks = np.zeros(len(activation_I) // 32 * 34, np.uint8)
    pointers = (ctypes.c_void_p(activation_I.ctypes.data), ctypes.c_void_p(blocks.ctypes.data))
    library.quantize_row_q8_0(*pointers, ctypes.c_int64(len(activation_I)))
    return blocks


def arm_q8_0(activation_I: np.ndarray) -> np.ndarray:
    """Return what ggml's quantize_row_q8_0 makes of a row on ARM (ggml-cpu/arch/arm/quants.c).

    The inverse is that of the rounded scale, which on x86 is 127 over the largest input.
    """
    inputs_GS = activation_I.reshape(-1, 32)
    scale_G = np.abs(inputs_GS).max(axis=1) / np.float32(127)
    inverse_G = np.divide(np.float32(1), scale_G, out=np.zeros_like(scale_G), where=scale_G != 0)
    blocks = np.zeros((len(scale_G), 34), np.uint8)
    blocks[:, :2] = scale_G.astype(np.float16)[:, None].view(np.uint8)
    blocks[:, 2:] = np.rint(inputs_GS * inverse_G[:, None]).astype(np.int8).view(np.uint8)
    return blocks.reshape(-1)


def test_slack_is_what_the_tests_give() -> None:
    """The slack behind the values is the one that the header asks for."""
    header = Path(__file__).parents[1] / "sources" / "sparse_matrix.h"
    assert f"slack_bytes = {SLACK_BYTES}" in header.read_text(encoding="utf-8")
