"""What every number format promises, held against ggml's C code."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.quant import ggml
from tests.support.errors import raises

NAMES = plugins.list_names("quant")
GGML_NAMES = tuple(name for name in NAMES if "gguf" in quants.load(name).formats)
C_FORMATS = tuple(name for name in GGML_NAMES if quants.load_ggml(name).library is ggml)
NUMPY_FORMATS = tuple(name for name in GGML_NAMES if name not in C_FORMATS)
BLOCK_FORMATS = tuple(name for name in GGML_NAMES if quants.load(name).block_size > 1)
O, I = 24, 512
HALF_PRECISION = 2.0**-11


def draw_weights(sparsity: float = 0.0, seed: int = 0) -> np.ndarray:
    """Return weights like a trained linear's: normal, rows of different scale, some exact zeros."""
    generator = np.random.default_rng(seed)
    scale_O1 = generator.uniform(0.005, 0.2, (O, 1))
    weight_OI = (generator.standard_normal((O, I)) * scale_O1).astype(np.float32)
    return np.where(generator.random((O, I)) < sparsity, np.float32(0), weight_OI)


def bound_error(quant: quants.Quant, weight_OI: np.ndarray) -> np.ndarray:
    """Return the largest error that rounding can make.

    A float of 32 bits is exact. One of 16 has at least 7 mantissa bits: 2^-8 of each weight, and
    2^-25 where half precision is subnormal, with a spacing of 2^-24. A block
    format codes [-a, a], a the largest magnitude of the block, in the whole bits that a scale in
    half precision leaves, c: one step is a * 2^(1 - c). Rounding costs half a step; the side that
    the asymmetric code range lacks is clipped by one. Scales in half precision add 2^-11 of a.
    MXFP4 has a power of two d for a scale, 4 d <= a < 8 d, and no value above 6 d: a is clipped by
    less than a quarter. Its values from 4 d on are 2 d apart: half of that is as much.
    """
    if quant.block_size == 1:
        return np.abs(weight_OI) * 0 if quant.bits == 32 else np.abs(weight_OI) * 2.0**-8 + 2.0**-25
    largest = (
        np.abs(weight_OI.reshape(O, -1, quant.block_size))
        .max(axis=2)
        .repeat(quant.block_size, axis=1)
    )
    if quant.grid and quant.grid.scale == "power_of_two":
        return largest / 4
    code_bits = int(quant.bits - 16 / quant.block_size)
    return largest * (2.0 ** (1 - code_bits) + HALF_PRECISION)


@pytest.mark.parametrize("name", NAMES)
def test_the_roundtrip_stays_within_one_step(name: str) -> None:
    """Quantizing and dequantizing moves no weight by more than a step of its block."""
    quant, weight_OI = quants.load(name), draw_weights()
    restored_OI = quant.dequantize(quant.quantize(weight_OI), I)
    assert restored_OI.shape == weight_OI.shape
    assert restored_OI.dtype == np.float32
    assert (np.abs(restored_OI - weight_OI) <= bound_error(quant, weight_OI)).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_spoiled_byte_is_noticed(name: str) -> None:
    """The bound is tight enough to fail when codes are damaged."""
    quant, weight_OI = quants.load(name), draw_weights()
    packed_OP = quant.quantize(weight_OI).copy()
    packed_OP[:, 3::7] ^= 0xA5
    with np.errstate(all="ignore"):
        restored_OI = quant.dequantize(packed_OP, I)
        assert not (np.abs(restored_OI - weight_OI) <= bound_error(quant, weight_OI)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_size_is_what_bits_says(name: str) -> None:
    """A packed row has exactly I * bits / 8 bytes of uint8."""
    quant = quants.load(name)
    packed_OP = quant.quantize(draw_weights())
    assert packed_OP.dtype == np.uint8
    assert packed_OP.shape == (O, I * quant.bits / 8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", ["half", "2:4", "whole blocks"])
def test_zeros_survive_exactly_where_promised(name: str, pattern: str) -> None:
    """``preserves_zero`` is True if and only if ggml reads every zero back as zero."""
    weight_OI = draw_weights(0.5)
    if pattern == "2:4":
        weight_OI = draw_weights()
        smallest = np.argsort(np.abs(weight_OI.reshape(O, -1, 4)), axis=2)[..., :2]
        np.put_along_axis(weight_OI.reshape(O, -1, 4), smallest, 0, axis=2)
    elif pattern == "whole blocks":
        weight_OI[:, 256:] = 0
    quant = quants.load(name)
    packed_OP = quant.quantize(weight_OI)
    read_OI = quant.dequantize(packed_OP, I)
    if quant.block_size > 1 and "gguf" in quant.formats:
        np.testing.assert_array_equal(
            ggml.dequantize(quants.load_ggml(name).type_id, packed_OP, I), read_OI
        )
    survived = bool((read_OI[weight_OI == 0] == 0).all())
    assert survived == quant.preserves_zero


def draw_importance(seed: int = 2) -> np.ndarray:
    """Return the mean squared inputs of a linear: over some orders of magnitude."""
    return np.exp(2 * np.random.default_rng(seed).standard_normal(I)).astype(np.float32)


def weigh_error(
    name: str, weight_OI: np.ndarray, importance_I: np.ndarray, given: np.ndarray | None
) -> np.ndarray:
    """Return the weighted squared error of each block, as ggml itself reads the bytes."""
    quant = quants.load_ggml(name)
    read_OI = ggml.dequantize(quant.type_id, quant.quantize(weight_OI, given), I)
    error_OI = (read_OI - weight_OI).astype(np.float64) ** 2 * importance_I
    return error_OI.reshape(O, -1, quant.block_size).sum(axis=2)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
def test_an_importance_lowers_the_weighted_error(name: str, sparsity: float) -> None:
    """Over all blocks, in formats whose search takes one; in the others it changes no byte."""
    weight_OI, importance_I = draw_weights(sparsity), draw_importance()
    weighted_OB = weigh_error(name, weight_OI, importance_I, importance_I)
    plain_OB = weigh_error(name, weight_OI, importance_I, None)
    if quants.load_ggml(name).uses_importance:
        assert weighted_OB.sum() < plain_OB.sum()
    else:
        assert (weighted_OB == plain_OB).all()


@pytest.mark.parametrize("name", GGML_NAMES)
def test_zeros_survive_with_an_importance(name: str) -> None:
    """``preserves_zero`` holds for the chosen scales too, in tiny and in empty blocks."""
    weight_OI = draw_weights(0.5)
    weight_OI[:, 256:] = 0
    weight_OI[1] *= np.float32(1e-9)
    quant = quants.load(name)
    read_OI = quant.dequantize(quant.quantize(weight_OI, draw_importance()), I)
    assert np.isfinite(read_OI).all()
    assert bool((read_OI[weight_OI == 0] == 0).all()) == quant.preserves_zero


@pytest.mark.parametrize(
    "name", [name for name in BLOCK_FORMATS if quants.load_ggml(name).uses_importance]
)
def test_an_importance_reaches_ggml(name: str) -> None:
    """The bytes differ from those of another importance, and repeat for the same one."""
    quant, weight_OI = quants.load(name), draw_weights()
    first, again, other = (quant.quantize(weight_OI, draw_importance(seed)) for seed in (2, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("name", NUMPY_FORMATS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_numpy_formats_write_the_bytes_of_ggml(name: str, sparsity: float) -> None:
    """The numpy quantizers equal ggml's C quantizers bit for bit, over scales, zeros and
    outliers.
    """
    quant, weight_OI = quants.load_ggml(name), draw_weights(sparsity, seed=1)
    weight_OI[3, ::32] = 40
    weight_OI[4] = 0
    np.testing.assert_array_equal(
        ggml.quantize(quant.type_id, weight_OI), quant.quantize(weight_OI)
    )


@pytest.mark.parametrize("name", C_FORMATS)
def test_c_formats_are_read_alike_by_numpy(name: str) -> None:
    """What ggml reads is what gguf-py's independent numpy version gives."""
    quant = quants.load_ggml(name)
    packed_OP = quant.quantize(draw_weights(0.5))
    expected_OI = gguf_quants.dequantize(packed_OP, GGMLQuantizationType(quant.type_id))
    np.testing.assert_allclose(quant.dequantize(packed_OP, I), expected_OI, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", GGML_NAMES)
def test_the_type_id_is_the_one_of_its_name(name: str) -> None:
    """The type id is gguf's number for the file's name."""
    assert GGMLQuantizationType[name.upper()] == quants.load_ggml(name).type_id


@pytest.mark.parametrize("name", C_FORMATS)
def test_a_missing_engine_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without llama-cpp-python such a format says how to install it, before any work."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for package, module in ((quants, "ggml"), (quants.formats, name)):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{module}", raising=False)
        monkeypatch.delattr(package, module, raising=False)
    with raises("missing-extra", "llama-cpp-python", 'pip install "racdeploy[llamacpp]"'):
        quants.load(name)


@pytest.mark.parametrize("name", NAMES)
def test_odd_rows_are_refused_with_a_reason(name: str) -> None:
    """Rows that are not whole blocks get a reason, whole ones an empty string."""
    quant = quants.load(name)
    assert quants.explain_misfit(quant, 512) == ""
    assert bool(quants.explain_misfit(quant, 520 + 1)) == (quant.block_size > 1)
    assert "521" in quants.explain_misfit(quant, 521) or quant.block_size == 1
