"""Call ggml's own C quantizers through ctypes, in the library that llama-cpp-python ships.

ggml reads past the end of rows that are not a multiple of the block size; that is asserted here
first.
Source: ``ggml_quantize_chunk`` in ggml.h and ``dequantize_row_*`` in ggml-quants.h.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path

import numpy as np

from racdeploy.errors import EngineError
from racdeploy.plugins import require_package
from racdeploy.quant.grid import Bytes, Floats
from racdeploy.tensors.ggml_types import TYPES_BY_ID

require_package("llama_cpp")
_SPEC = importlib.util.find_spec("llama_cpp")
assert _SPEC, "require() found it"
assert _SPEC.origin, "llama_cpp is a package with a file"
_SUFFIX = "dylib" if sys.platform == "darwin" else "so"
_LIBRARY_FILE = Path(_SPEC.origin).parent / "lib" / f"libggml-base.{_SUFFIX}"


def quantize(ggml_type: int, weight_OI: Floats, importance_I: Floats | None = None) -> Bytes:
    """Return packed_OP of float32 weights, whose rows are whole blocks.

    importance_I, a row of ggml's importance matrix, weighs each input's squared error; above 0.
    """
    O, I = weight_OI.shape
    weight_OI = np.ascontiguousarray(weight_OI, dtype=np.float32)
    packed_OP = np.empty((O, _count_row_bytes(ggml_type, I)), dtype=np.uint8)

    matrix = None
    if importance_I is not None:
        assert importance_I.shape == (I,), "one importance an input"
        assert (importance_I > 0).all(), "importance must be above zero"
        importance_I = np.ascontiguousarray(importance_I, dtype=np.float32)
        matrix = importance_I.ctypes.data

    written = _library().ggml_quantize_chunk(
        ggml_type, weight_OI.ctypes.data, packed_OP.ctypes.data, 0, O, I, matrix
    )
    if written != packed_OP.nbytes:
        raise EngineError(
            "ggml-failed", f"ggml wrote {written} bytes of {packed_OP.nbytes} in type {ggml_type}"
        )

    return packed_OP


def dequantize(ggml_type: int, packed_OP: Bytes, I: int) -> Floats:
    """Return float32 weight_OI of packed rows."""
    O, P = packed_OP.shape
    assert _count_row_bytes(ggml_type, I) == P, "packed rows do not match the row length"
    packed_OP = np.ascontiguousarray(packed_OP)
    weight_OI = np.empty((O, I), dtype=np.float32)

    name = TYPES_BY_ID[ggml_type].name.replace("_k", "_K")
    convert = _library()[f"dequantize_row_{name}"]
    convert.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    convert.restype = None
    convert(packed_OP.ctypes.data, weight_OI.ctypes.data, O * I)
    return weight_OI


def _count_row_bytes(ggml_type: int, row_length: int) -> int:
    _, _, block_weights, block_bytes = TYPES_BY_ID[ggml_type]
    assert row_length % block_weights == 0, f"{row_length} weights are no blocks of {block_weights}"
    return row_length // block_weights * block_bytes


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(_LIBRARY_FILE))
    except OSError as error:
        raise EngineError(
            "no-ggml-library",
            f"cannot load ggml from {_LIBRARY_FILE}: {error}",
            remedy="pip install --force-reinstall llama-cpp-python",
        ) from error

    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (number, pointer, pointer, size, size, size, pointer)
    return library
