"""Quantizers of gguf-py, bit-exact with ggml's C code; with an importance, ggml itself."""

from __future__ import annotations

from gguf import GGMLQuantizationType, quants

from racdeploy.quant.grid import Bytes, Floats


def quantize(ggml_type: int, weight_OI: Floats, importance_I: Floats | None = None) -> Bytes:
    """Return packed_OP of float32 weights, rows of whole blocks; the importance is ignored."""
    return quants.quantize(weight_OI, GGMLQuantizationType(ggml_type))


def quantize_weighted(
    ggml_type: int, weight_OI: Floats, importance_I: Floats | None = None
) -> Bytes:
    """Return packed_OP of float32 weights; with an importance, by ggml's search of scales."""
    if importance_I is None:
        return quantize(ggml_type, weight_OI)

    from racdeploy.quant import ggml  # needs llama-cpp-python

    return ggml.quantize(ggml_type, weight_OI, importance_I)


def dequantize(ggml_type: int, packed_OP: Bytes, I: int) -> Floats:
    """Return float32 weight_OI of packed rows."""
    weight_OI: Floats = quants.dequantize(packed_OP, GGMLQuantizationType(ggml_type))
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI
