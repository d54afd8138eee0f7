"""Quantizers of gguf-py, bit-exact with ggml's C code; with an importance, ggml itself."""

from __future__ import annotations

from gguf import GGMLQuantizationType, quants

from racdeploy.quant.grid import Bytes, Floats


def quantize(ggml_type: int, weight_OI: Floats, importance_I: Floats | None = None) -> Bytes:
    """Return packed_OP of float32 weights, rows of whole blocks.

    With an importance, it is ggml that searches the scales, for which llama-cpp-python is needed.
    """
    if importance_I is None:
        return quants.quantize(weight_OI, GGMLQuantizationType(ggml_type))

    from racdeploy.quant import ggml

    return ggml.quantize(ggml_type, weight_OI, importance_I)


def dequantize(ggml_type: int, packed_OP: Bytes, I: int) -> Floats:
    """Return float32 weight_OI of packed rows."""
    weight_OI: Floats = quants.dequantize(packed_OP, GGMLQuantizationType(ggml_type))
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI
