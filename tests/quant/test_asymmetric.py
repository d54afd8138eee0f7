"""Q2_K and Q4_K pack weights that they can hold exactly; all others are ggml's."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants

from racdeploy.quant import ggml
from racdeploy.quant.asymmetric import AsymmetricFinder
from racdeploy.quant.formats import q2_k, q4_k

O, BLOCKS, I = 120, 3, 768
TINIEST, LARGEST = 2.0**-24, 8000.0
FORMATS = pytest.mark.parametrize("form", [q2_k, q4_k], ids=["q2_k", "q4_k"])


def draw_grid(form: ModuleType, zeros: float | None, seed: int = 0) -> np.ndarray:
    """Return weights on a grid; with a share of ``zeros``, minima are such that a code is zero."""
    generator = np.random.default_rng(seed)
    groups = form.BLOCK_SIZE // form.GROUP_SIZE
    code_OXGS = generator.integers(0, form.CODE_RANGE[1] + 1, (O, BLOCKS, groups, form.GROUP_SIZE))
    step_OXG = generator.integers(0, form.STEP_CODE_RANGE[1] + 1, (O, BLOCKS, groups))
    step_OXG[generator.random((O, BLOCKS)) < 0.1] = 0
    minimum_OXG = generator.integers(0, form.MINIMUM_CODE_RANGE[1] + 1, step_OXG.shape)

    if zeros is not None:
        code_OXGS[generator.random(code_OXGS.shape) < zeros] = form.ZERO_CODE
        minimum_OXG = step_OXG * form.ZERO_CODE // form.MINIMUM_SCALE_RATIO

    scale_OX = generator.integers(1, 0x6C00, (O, BLOCKS)).astype(np.uint16).view(np.float16)
    scale_OX = scale_OX * generator.choice(np.float16([-1, 1]), (O, BLOCKS))
    scale_OX[0], scale_OX[1] = TINIEST, LARGEST

    product_OXGS = code_OXGS * step_OXG[..., None]
    product_OXGS -= (minimum_OXG * form.MINIMUM_SCALE_RATIO)[..., None]
    weight_OXGS = product_OXGS * scale_OX.astype(np.float64)[:, :, None, None]
    return weight_OXGS.astype(np.float32).reshape(O, I)


def draw_importance() -> np.ndarray:
    return np.exp(2 * np.random.default_rng(2).standard_normal(I)).astype(np.float32)


@FORMATS
@pytest.mark.parametrize("zeros", [None, 0.0, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("weighed", [False, True])
def test_weights_on_a_grid_come_back_to_the_last_bit(
    form: ModuleType, zeros: float | None, weighed: bool
) -> None:
    """With an importance too; ggml's C code and gguf-py read the same."""
    weight_OI = draw_grid(form, zeros)
    packed_OP = form.quantize(weight_OI, draw_importance() if weighed else None)
    np.testing.assert_array_equal(ggml.dequantize(form.GGML_TYPE, packed_OP, I), weight_OI)

    other_OI = gguf_quants.dequantize(packed_OP, GGMLQuantizationType(form.GGML_TYPE))
    np.testing.assert_array_equal(other_OI, weight_OI)


@FORMATS
def test_ggml_alone_would_lose_them(form: ModuleType) -> None:
    """So the test above can fail: zeros too."""
    weight_OI = draw_grid(form, 0.7)
    packed_OP = ggml.quantize(form.GGML_TYPE, weight_OI, draw_importance())
    stored_OI = ggml.dequantize(form.GGML_TYPE, packed_OP, I)
    assert (stored_OI != weight_OI).mean() > 0.1
    assert (stored_OI[weight_OI == 0] != 0).mean() > 0.1


@FORMATS
def test_steps_and_scales_are_those_in_the_bytes(form: ModuleType) -> None:
    """Where zero has a code, weights are codes times steps, and steps whole numbers of scales."""
    weight_OI = draw_grid(form, 0.5)
    packed_OP = form.quantize(weight_OI)
    step_OG, scale_OX = form.steps(packed_OP), form.scales(packed_OP)
    code_OGS = (
        weight_OI.reshape(O, -1, form.GROUP_SIZE) / np.where(step_OG == 0, 1, step_OG)[..., None]
    )
    number_OXG = step_OG.reshape(O, BLOCKS, -1) / np.where(scale_OX == 0, 1, scale_OX)[..., None]

    np.testing.assert_array_equal(code_OGS, np.rint(code_OGS))
    np.testing.assert_array_equal(number_OXG, np.rint(number_OXG))
    assert (code_OGS.min(), code_OGS.max()) == (
        -form.ZERO_CODE,
        form.CODE_RANGE[1] - form.ZERO_CODE,
    )
    assert number_OXG.max() <= form.STEP_CODE_RANGE[1]


@FORMATS
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weighed", [False, True])
def test_ordinary_weights_have_the_bytes_of_ggml(
    form: ModuleType, sparsity: float, weighed: bool
) -> None:
    """Also beside rows and blocks that are all zero, or too large for any scale."""
    generator = np.random.default_rng(1)
    weight_OI = generator.standard_normal((O, I)).astype(np.float32)
    weight_OI[generator.random((O, I)) < sparsity] = 0
    weight_OI[3], weight_OI[4, :256] = 0, 0
    weight_OI[5] *= np.float32(1e9)
    weight_OI[6] *= np.float32(1e-9)

    importance_I = draw_importance() if weighed else None
    expected_OP = ggml.quantize(form.GGML_TYPE, weight_OI, importance_I)
    np.testing.assert_array_equal(form.quantize(weight_OI, importance_I), expected_OP)


@FORMATS
def test_a_block_off_the_grid_changes_no_other(form: ModuleType) -> None:
    """One weight is off by its last bit: that block is ggml's, the rest of the row as it was."""
    weight_OI = draw_grid(form, None)
    place = int(np.flatnonzero(weight_OI[9, 256:512])[0]) + 256
    spoiled_OI = weight_OI.copy()
    spoiled_OI[9, place] = np.nextafter(weight_OI[9, place], np.float32(0))
    packed_OP = form.quantize(spoiled_OI, draw_importance())
    stored_OI = ggml.dequantize(form.GGML_TYPE, packed_OP, I)
    expected_OP = ggml.quantize(form.GGML_TYPE, spoiled_OI, draw_importance())
    expected_OI = ggml.dequantize(form.GGML_TYPE, expected_OP, I)
    assert (stored_OI[9, 256:512] != spoiled_OI[9, 256:512]).any()
    np.testing.assert_array_equal(stored_OI[9, 256:512], expected_OI[9, 256:512])

    spoiled_OI[9, 256:512] = stored_OI[9, 256:512] = 0
    np.testing.assert_array_equal(stored_OI, spoiled_OI)


def test_every_group_of_a_small_grid_is_found() -> None:
    """All steps, minima and pairs of codes of Q2_K, which have the scale 1 by a neighbour."""
    finder = AsymmetricFinder(3, 15, 15, 2, 2)
    numbers = np.indices((16, 16, 4, 4)).reshape(4, -1)
    step_N, minimum_N, first_N, second_N = numbers
    product_N2 = step_N[:, None] * np.stack([first_N, second_N], 1) - 2 * minimum_N[:, None]

    neighbour_N2 = np.broadcast_to(np.array([1, 0]), product_N2.shape)
    weight_N22 = np.stack([product_N2, neighbour_N2], 1).astype(np.float32)
    found = finder.find(weight_N22)
    assert len(found.index_N) == len(weight_N22)

    back_N22 = found.code_NGS * found.step_code_NG[..., None] - 2 * found.minimum_code_NG[..., None]
    np.testing.assert_array_equal(back_N22 * found.scale_N[:, None, None], weight_N22)
    assert found.code_NGS.min() == 0
    assert found.code_NGS.max() == 3


@FORMATS
def test_finer_lattices_are_given_up_at_once(form: ModuleType) -> None:
    """Whole numbers that need more codes than there are fit no scale; ggml's bytes come out."""
    generator = np.random.default_rng(5)
    numbers_OI = generator.integers(-100, 101, (O, I))
    weight_OI = (numbers_OI * 2.0**-12).astype(np.float32)
    finder = AsymmetricFinder(
        form.CODE_RANGE[1],
        form.STEP_CODE_RANGE[1],
        form.MINIMUM_CODE_RANGE[1],
        form.MINIMUM_SCALE_RATIO,
        form.ZERO_CODE,
    )
    assert not finder._reaches(weight_OI.reshape(-1, 256 // form.GROUP_SIZE, form.GROUP_SIZE)).any()
    expected_OP = ggml.quantize(form.GGML_TYPE, weight_OI, None)
    np.testing.assert_array_equal(form.quantize(weight_OI), expected_OP)


@FORMATS
def test_weights_below_half_precision_are_not_taken_for_exact(form: ModuleType) -> None:
    """A number that is no multiple of the smallest scale is left to ggml."""
    weight_OI = draw_grid(form, None)
    weight_OI[7, 5] = 1e-9
    expected_OP = ggml.quantize(form.GGML_TYPE, weight_OI[7:8], None)
    stored_OI = ggml.dequantize(form.GGML_TYPE, form.quantize(weight_OI[7:8]), I)
    other_OI = ggml.dequantize(form.GGML_TYPE, expected_OP, I)
    np.testing.assert_array_equal(stored_OI[:, :256], other_OI[:, :256])
