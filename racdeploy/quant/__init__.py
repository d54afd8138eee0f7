"""Number formats, one file each in ``formats``: numpy arrays in, packed bytes out.

A file has the members of :class:`Quant`. If its ``PRESERVES_ZERO`` is True, zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, cast

import numpy as np

from racdeploy import plugins
from racdeploy.errors import ModelError
from racdeploy.quant.grid import Bytes, Floats, Grid
from racdeploy.quant.matmulnbits import MatMulNBitsBlocks
from racdeploy.tensors.ggml_types import GGML_TYPES

IMPORTANCE_FILE = "importance.safetensors"
"""File of a pruned model: mean squared inputs, by linear."""
DENSE_IMPORTANCE_FILE = "dense-importance.safetensors"
"""File with those of the dense model, under its names and for all its inputs."""
IMATRIX_SUFFIX = ".imatrix.gguf"
"""Of llama.cpp's file of them, beside a model."""


RoundingQuant = str | Mapping[str, str]
"""Number format whose codes are chosen while pruning, or linear → format; empty for none."""
FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q4_0", "q5_k": "q5_0", "q6_k": "q8_0"}
"""Formats for rows that blocks of 256 do not divide: as wide if there is one; zeros stay zeros."""


def rounding_quant_of(codes: RoundingQuant, linear: str) -> str:
    """Return the number format whose codes are chosen for a linear, or an empty string."""
    return codes if isinstance(codes, str) else codes.get(linear, "")


class Quant(Protocol):
    """Interface of a number format's module.

    ``FORMATS`` are the file formats that store it, ``BITS`` the bits per weight including scales,
    and ``BLOCK_SIZE`` the number of consecutive weights of a row in a quant block. ``quantize``
    takes finite float32 weight_OI, ``I`` a multiple of ``BLOCK_SIZE``, and returns packed_OP with
    ``I * BITS / 8`` bytes per row. ``GRID``, a :class:`racdeploy.quant.grid.Grid`, is there if its
    codes can be chosen.
    """

    FORMATS: tuple[str, ...]
    BITS: float
    BLOCK_SIZE: int
    PRESERVES_ZERO: bool

    def quantize(self, weight_OI: Floats) -> Bytes: ...

    def dequantize(self, packed_OP: Bytes, I: int) -> Floats: ...


class GgmlQuant(Quant, Protocol):
    """A number format of GGUF files; ``GGML_TYPE`` is ggml's type id.

    importance_I is a positive weight of each input's squared error, which ggml's search of scales
    takes. A format whose search in ggml takes none has ``IGNORES_IMPORTANCE``.
    """

    GGML_TYPE: int

    def quantize(self, weight_OI: Floats, importance_I: Floats | None = None) -> Bytes: ...


class OnnxQuant(Quant, Protocol):
    """A number format of ONNX graphs; ``JS_DTYPE`` is its ``dtype`` in transformers.js."""

    JS_DTYPE: str


class MatMulNBitsQuant(OnnxQuant, Protocol):
    """A format of onnxruntime's MatMulNBits: ``CODE_BITS`` per code, maybe with ``ZERO_POINTS``."""

    CODE_BITS: int
    ZERO_POINTS: bool

    def blocks(self, packed_OP: Bytes, I: int) -> MatMulNBitsBlocks: ...


def has_grid(name: str) -> bool:
    """Return True if the codes of a number format can be chosen."""
    return hasattr(load(name), "GRID")


def uses_importance(name: str) -> bool:
    """Return True if an importance matrix changes the codes of a block format."""
    return not hasattr(load(name), "IGNORES_IMPORTANCE")


def load_grid(name: str) -> Grid:
    """Return the grid of a number format that has one."""
    return cast(Grid, getattr(load(name), "GRID"))  # noqa: B009


def make_ggml_members(
    name: str, module: Any
) -> tuple[int, float, int, partial[Bytes], partial[Floats]]:
    """Return ``GGML_TYPE``, ``BITS``, ``BLOCK_SIZE``, ``quantize`` and ``dequantize`` of a format.

    Args:
        name: of ggml's type.
        module: has ``quantize`` and ``dequantize``, which take the type's id first.
    """
    known = GGML_TYPES[name]
    codec = partial(module.quantize, known.type_id), partial(module.dequantize, known.type_id)
    return known.type_id, known.bits, known.block_weights, *codec


def load_ggml(name: str) -> GgmlQuant:
    """Import the number format of that name, one of GGUF."""
    return cast(GgmlQuant, plugins.load("quant", name))


def load_onnx(name: str) -> OnnxQuant:
    """Import the number format of that name, one of ONNX."""
    return cast(OnnxQuant, plugins.load("quant", name))


def load_matmulnbits(name: str) -> MatMulNBitsQuant:
    """Import the number format of that name, one of MatMulNBits."""
    return cast(MatMulNBitsQuant, plugins.load("quant", name))


def is_matmulnbits(name: str) -> bool:
    """Return True for a number format of MatMulNBits."""
    return hasattr(load(name), "blocks")


def load(name: str) -> Quant:
    """Import the number format of that name; see :func:`racdeploy.plugins.load`."""
    return cast(Quant, plugins.load("quant", name))


def check_finite(
    name: str,
    quant: str,
    weight_OI: Floats,
    stored_OI: Floats,
    wider: str,
) -> None:
    """Raise if the dequantized weights, stored_OI, are not all finite.

    Args:
        wider: number formats for larger weights, for the message.

    Raises:
        ModelError: the weights are too large for the format, or are not finite themselves.
    """
    if np.isfinite(stored_OI).all():
        return

    if np.isfinite(weight_OI).all():
        raise ModelError(
            "weights-too-large",
            f"{name!r} has weights up to {float(np.abs(weight_OI).max()):g}, too large for {quant}",
            remedy=f"export with quant {wider}",
        )

    raise ModelError(
        "weights-not-finite",
        f"{name!r} holds weights that are infinite or not a number",
        remedy="the checkpoint is damaged or its training diverged",
    )


def fit_rows(
    name: str, row_length: int, fallbacks: Mapping[str, str] = FALLBACKS
) -> tuple[str, str]:
    """Return the number format that stores rows of that length, and why it is another, if it is."""
    reasons = []
    while reason := explain_misfit(load(name), row_length):  # a fallback may not fit either
        reasons.append(reason)
        name = fallbacks.get(name, "f16")
    return name, "; ".join(reasons)


def explain_misfit(quant: Quant, row_length: int) -> str:
    """Return the reason why a format cannot store rows of that length, or an empty string."""
    if row_length % quant.BLOCK_SIZE == 0:
        return ""
    return f"rows of {row_length} weights do not divide into quant blocks of {quant.BLOCK_SIZE}"
