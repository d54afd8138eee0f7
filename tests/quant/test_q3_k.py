"""Q3_K packs weights that it can hold exactly, whatever their codes; all others are ggml's."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants

from racdeploy.quant import ggml
from racdeploy.quant.formats import q3_k

O, BLOCKS, GROUPS = 200, 3, 16
I = BLOCKS * q3_k.BLOCK_SIZE
TINIEST, LARGEST = 2.0**-24, 65504.0


def draw_grid(zeros: float, seed: int = 0) -> np.ndarray:
    """Return weights on a grid: any half-precision scales; whole groups and blocks are zero too."""
    generator = np.random.default_rng(seed)
    code_OXGS = generator.integers(-4, 4, (O, BLOCKS, GROUPS, 16))
    code_OXGS[generator.random(code_OXGS.shape) < zeros] = 0

    step_code_OXG = generator.integers(-32, 32, (O, BLOCKS, GROUPS))
    step_code_OXG[generator.random(step_code_OXG.shape) < 0.2] = 0
    step_code_OXG[generator.random((O, BLOCKS)) < 0.1] = 0
    step_code_OXG //= generator.integers(1, 9, (O, BLOCKS, 1))

    positive_OX = generator.integers(1, 0x7C00, (O, BLOCKS)).astype(np.uint16)
    scale_OX = positive_OX.view(np.float16).astype(np.float32)
    scale_OX *= generator.choice(np.float32([-1, 1]), (O, BLOCKS))
    scale_OX[0], scale_OX[1] = TINIEST, LARGEST
    scale_OX[2] = -LARGEST

    step_OXG = step_code_OXG * scale_OX[:, :, None]
    weight_OXGS = code_OXGS * step_OXG[:, :, :, None]
    return weight_OXGS.astype(np.float32).reshape(O, I)


def draw_importance() -> np.ndarray:
    return np.exp(2 * np.random.default_rng(2).standard_normal(I)).astype(np.float32)


def read(packed_OP: np.ndarray) -> np.ndarray:
    """Return the weights as ggml's C code reads them."""
    return ggml.dequantize(q3_k.GGML_TYPE, packed_OP, I)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("weighed", [False, True])
def test_weights_on_a_grid_come_back_to_the_last_bit(zeros: float, weighed: bool) -> None:
    """With an importance too, by which ggml itself would choose other scales; both of ggml's
    readers agree.
    """
    weight_OI = draw_grid(zeros)
    importance_I = draw_importance() if weighed else None
    packed_OP = q3_k.quantize(weight_OI, importance_I)
    np.testing.assert_array_equal(read(packed_OP), weight_OI)

    other_OI = gguf_quants.dequantize(packed_OP, GGMLQuantizationType.Q3_K)
    np.testing.assert_array_equal(other_OI, weight_OI)


def test_ggml_alone_would_lose_them() -> None:
    """So the test above can fail: with an importance most sparse blocks come out changed."""
    weight_OI = draw_grid(0.9)
    stored_OI = read(ggml.quantize(q3_k.GGML_TYPE, weight_OI, draw_importance()))
    changed_OXB = (stored_OI != weight_OI).reshape(O, BLOCKS, q3_k.BLOCK_SIZE)
    assert changed_OXB.any(axis=2).mean() > 0.3


def test_steps_and_scales_are_those_in_the_bytes() -> None:
    """Weights are whole codes in range times the steps, these whole numbers times the scales."""
    weight_OI = draw_grid(0.5)
    packed_OP = q3_k.quantize(weight_OI)
    step_OG, scale_OX = q3_k.steps(packed_OP), q3_k.scales(packed_OP)
    np.testing.assert_array_equal(scale_OX, scale_OX.astype(np.float16))

    code_OGS = weight_OI.reshape(O, -1, 16) / np.where(step_OG == 0, 1, step_OG)[:, :, None]
    step_code_OXG = step_OG.reshape(O, BLOCKS, -1) / np.where(scale_OX == 0, 1, scale_OX)[..., None]
    for number, (lowest, highest) in ((code_OGS, (-4, 3)), (step_code_OXG, (-32, 31))):
        np.testing.assert_array_equal(number, np.rint(number))
        assert (number.min(), number.max()) == (lowest, highest)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weighed", [False, True])
def test_ordinary_weights_have_the_bytes_of_ggml(
    sparsity: float, dtype: str, weighed: bool
) -> None:
    """Also beside rows and blocks that are all zero, or too large for any scale."""
    generator = np.random.default_rng(1)
    weight_OI = generator.standard_normal((O, I)).astype(np.float32)
    if dtype == "bfloat16":
        weight_OI = (weight_OI.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    weight_OI[generator.random((O, I)) < sparsity] = 0
    weight_OI[3] = 0
    weight_OI[4, :256] = 0
    weight_OI[5] *= np.float32(1e9)
    weight_OI[6] *= np.float32(1e-9)

    importance_I = draw_importance() if weighed else None
    expected_OP = ggml.quantize(q3_k.GGML_TYPE, weight_OI, importance_I)
    np.testing.assert_array_equal(q3_k.quantize(weight_OI, importance_I), expected_OP)


def test_a_block_off_the_grid_changes_no_other() -> None:
    """One weight is off by its last bit: that block is ggml's, the rest of the row as it was."""
    weight_OI = draw_grid(0.5)
    place = int(np.flatnonzero(weight_OI[9, 256:512])[0]) + 256
    spoiled_OI = weight_OI.copy()
    spoiled_OI[9, place] = np.nextafter(weight_OI[9, place], np.float32(0))
    stored_OI = read(q3_k.quantize(spoiled_OI, draw_importance()))
    expected_OI = read(ggml.quantize(q3_k.GGML_TYPE, spoiled_OI, draw_importance()))
    assert (stored_OI[9, 256:512] != spoiled_OI[9, 256:512]).any()
    np.testing.assert_array_equal(stored_OI[9, 256:512], expected_OI[9, 256:512])

    spoiled_OI[9, 256:512] = stored_OI[9, 256:512] = 0
    np.testing.assert_array_equal(stored_OI, spoiled_OI)


def test_a_file_can_be_quantized_again_without_loss() -> None:
    """What ggml chose is on a grid as well."""
    weight_OI = np.random.default_rng(3).standard_normal((O, I)).astype(np.float32)
    stored_OI = read(ggml.quantize(q3_k.GGML_TYPE, weight_OI, draw_importance()))
    again_OI = read(q3_k.quantize(stored_OI, draw_importance()[::-1]))
    np.testing.assert_array_equal(again_OI, stored_OI)
