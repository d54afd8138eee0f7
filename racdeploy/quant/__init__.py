"""Number formats, one file each in ``formats``: numpy arrays in, packed bytes out.

A file holds ``QUANT``, a :class:`Quant`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from racdeploy import plugins
from racdeploy.errors import ModelError
from racdeploy.quant.grid import Floats, Grid
from racdeploy.quant.matmulnbits import MatMulNBitsCodec
from racdeploy.quant.number_format import GgmlCodec as GgmlCodec
from racdeploy.quant.number_format import Quant as Quant

IMPORTANCE_FILE = "importance.safetensors"
"""File of a pruned model: mean squared inputs, by linear."""
DENSE_IMPORTANCE_FILE = "dense-importance.safetensors"
"""File with those of the dense model, under its names and for all its inputs."""
IMATRIX_SUFFIX = ".imatrix.gguf"
"""Of llama.cpp's file of them, beside a model."""


RoundingQuant = str | Mapping[str, str]
"""Number format whose codes are chosen while pruning, or linear → format; empty for none."""


def rounding_quant_of(codes: RoundingQuant, linear: str) -> str:
    """Return the number format whose codes are chosen for a linear, or an empty string."""
    return codes if isinstance(codes, str) else codes.get(linear, "")


def load(name: str) -> Quant:
    """Import the number format of that name; see :func:`racdeploy.plugins.load`."""
    quant: Quant = plugins.load("quant", name).QUANT
    return quant


def load_ggml(name: str) -> GgmlCodec:
    """Return the codec of a number format of GGUF files."""
    codec = load(name).codec
    assert isinstance(codec, GgmlCodec), f"{name} is no type of ggml"
    return codec


def load_matmulnbits(name: str) -> MatMulNBitsCodec:
    """Return the codec of a number format of MatMulNBits."""
    codec = load(name).codec
    assert isinstance(codec, MatMulNBitsCodec), f"{name} is no format of MatMulNBits"
    return codec


def load_grid(name: str) -> Grid:
    """Return the grid of a number format that has one."""
    grid = load(name).grid
    assert grid is not None, f"{name} has no codes to choose"
    return grid


def has_grid(name: str) -> bool:
    """Return True if the codes of a number format can be chosen."""
    return load(name).grid is not None


def is_matmulnbits(name: str) -> bool:
    """Return True for a number format of MatMulNBits."""
    return isinstance(load(name).codec, MatMulNBitsCodec)


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


def fit_rows(name: str, row_length: int, *, in_preset: bool = False) -> tuple[str, str]:
    """Return the number format that stores rows of that length, and why it is another, if it is."""
    reasons = []
    while reason := explain_misfit(load(name), row_length):  # a fallback may not fit either
        reasons.append(reason)
        quant = load(name)
        name = quant.fallback
        if in_preset and quant.preset_fallback:
            name = quant.preset_fallback
    return name, "; ".join(reasons)


def explain_misfit(quant: Quant, row_length: int) -> str:
    """Return the reason why a format cannot store rows of that length, or an empty string."""
    if row_length % quant.block_size == 0:
        return ""
    return f"rows of {row_length} weights do not divide into quant blocks of {quant.block_size}"
