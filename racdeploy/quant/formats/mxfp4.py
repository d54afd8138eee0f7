"""MXFP4: 32 four-bit floats (E2M1) with a shared power-of-two scale; codes 0 and 8 are zero.

Source: OCP Microscaling Formats specification 1.0; ``quantize_row_mxfp4_ref`` in ggml-quants.c.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from racdeploy.quant import numpy_ggml, read_ggml_type
from racdeploy.quant.grid import Bytes, Floats, Grid, GridCodes, join_fields, pack_halves

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("mxfp4")
PRESERVES_ZERO = True
_CHUNK_WEIGHTS = 32_768  # at a time: a few arrays of that size stay in a core's cache
_MAX_HALVES = 12.0
# Code of each magnitude in halves: 0, 1, 2, 3, 4, 6, 8 and 12 have one; 255 marks the others.
_CODE_OF_HALVES = np.array([0, 1, 2, 3, 4, 255, 5, 255, 6, 255, 255, 255, 7], dtype=np.uint8)

dequantize = partial(numpy_ggml.dequantize, GGML_TYPE)


def quantize(weight_OI: Floats, importance_I: Floats | None = None) -> Bytes:
    """Return packed rows: ggml's, bit for bit, or with exponents chosen for an importance."""
    if importance_I is None:
        return numpy_ggml.quantize(GGML_TYPE, weight_OI)

    assert (importance_I > 0).all(), "importance must be above zero"
    O, I = weight_OI.shape
    rows = max(1, _CHUNK_WEIGHTS // I)

    importance_GS = np.tile(importance_I.astype(np.float32).reshape(-1, BLOCK_SIZE), (rows, 1))

    chunks = []
    for start in range(0, O, rows):
        weight_GS = np.ascontiguousarray(weight_OI[start : start + rows]).reshape(-1, BLOCK_SIZE)
        chunks.append(_choose(weight_GS, importance_GS[: len(weight_GS)]))

    return np.concatenate(chunks).reshape(O, -1)


def _choose(weight_GS: Floats, importance_GS: Floats) -> Bytes:
    """Return packed_GP, each block with the exponent of least weighted error."""
    G = len(weight_GS)
    best_G = np.full(G, np.inf, dtype=np.float32)
    exponent_G = np.zeros(G, dtype=np.uint8)
    halves_GS = np.zeros_like(weight_GS)

    _, above_G = np.frexp(np.abs(weight_GS).max(1))  # the largest is below 2**above

    # ggml's exponent may clip the largest weight by up to a quarter, so its neighbours are tried.
    for shift in (0, 1, -1):
        # Exponent byte e makes one half worth 2**(e - 128); ggml takes e = above - 3 + 127.
        tried_G = np.clip(above_G - 3 + 127 + shift, 0, 254).astype(np.int32)

        half_G1 = np.ldexp(np.float32(1), tried_G - 128)[:, None]

        rounded_GS = _round_to_halves(weight_GS / half_G1)

        error_GS = weight_GS - rounded_GS * half_G1
        error_G = np.einsum("gs,gs,gs->g", error_GS, error_GS, importance_GS)

        better_G = error_G < best_G
        np.copyto(best_G, error_G, where=better_G)
        np.copyto(exponent_G, tried_G.astype(np.uint8), where=better_G)
        np.copyto(halves_GS, rounded_GS, where=better_G[:, None])

    magnitude_GS = _CODE_OF_HALVES[np.abs(halves_GS).astype(np.intp)]
    sign_GS = (halves_GS < 0).view(np.uint8) << np.uint8(3)

    code_GP = pack_halves(magnitude_GS | sign_GS)
    return np.concatenate([exponent_G[:, None], code_GP], axis=1)


def _round_to_halves(ratio_GS: Floats) -> Floats:
    """Return the nearest E2M1 values in halves: spacing 1 up to 4, 2 up to 8, and 4 beyond."""
    size_GS = np.minimum(np.abs(ratio_GS), _MAX_HALVES)
    spacing_GS = np.select(
        [size_GS < 4, size_GS < 8], [np.float32(1), np.float32(2)], np.float32(4)
    )
    rounded_GS = np.rint(size_GS / spacing_GS) * spacing_GS
    return np.asarray(np.copysign(rounded_GS, ratio_GS), dtype=np.float32)


def _pack_grid(codes: GridCodes) -> Bytes:
    _, above_OX = np.frexp(codes.scale_OX)  # a scale is 2**(above − 1)
    exponent_N1 = (above_OX.reshape(-1, 1) + 127).astype(np.uint8)
    code_NX = pack_halves(codes.code_OI.reshape(-1, BLOCK_SIZE))
    return join_fields(codes, exponent_N1, code_NX)


GRID = Grid(
    (0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12),  # in halves
    BLOCK_SIZE,
    BLOCK_SIZE,
    _pack_grid,
    scale="power_of_two",
)
