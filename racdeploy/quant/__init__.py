"""Number formats, one file each in ``formats``: numpy arrays in, packed bytes out.

A file has the members of :class:`Quant`. If its ``PRESERVES_ZERO`` is True, zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from racdeploy import plugins
from racdeploy.errors import ModelError, UsageError
from racdeploy.quant.matmulnbits import MatMulNBitsBlocks
from racdeploy.tensors.ggml_types import GGML_TYPES

IMPORTANCE_FILE = "importance.safetensors"
"""File of a pruned model: mean squared inputs, by linear."""
DENSE_IMPORTANCE_FILE = "dense-importance.safetensors"
"""File with those of the dense model, under its names and for all its inputs."""


RoundingQuant = str | Mapping[str, str]
"""Number format whose codes are chosen while pruning, or linear → format; empty for none."""


def rounding_quant_of(codes: RoundingQuant, linear: str) -> str:
    """Return the number format whose codes are chosen for a linear, or an empty string."""
    return codes if isinstance(codes, str) else codes.get(linear, "")


class Quant(Protocol):
    """Interface of a number format's module.

    ``FORMATS`` are the file formats that store it, ``BITS`` the bits per weight including scales,
    and ``BLOCK_SIZE`` the number of consecutive weights of a row in a quant block. ``quantize``
    takes finite float32 weight_OI, ``I`` a multiple of ``BLOCK_SIZE``, and returns packed_OP with
    ``I * BITS / 8`` bytes per row.
    """

    FORMATS: tuple[str, ...]
    BITS: float
    BLOCK_SIZE: int
    PRESERVES_ZERO: bool

    def quantize(self, weight_OI: NDArray[np.float32]) -> NDArray[np.uint8]: ...

    def dequantize(self, packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]: ...


class GgmlQuant(Quant, Protocol):
    """A number format of GGUF files; ``GGML_TYPE`` is ggml's type id.

    With importance_I, a positive weight of each input's squared error, the scales minimize the
    weighted error; without it the bytes are those that ggml writes.
    """

    GGML_TYPE: int

    def quantize(
        self, weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]: ...


class OnnxQuant(Quant, Protocol):
    """A number format of ONNX graphs; ``JS_DTYPE`` is its ``dtype`` in transformers.js."""

    JS_DTYPE: str


class MatMulNBitsQuant(OnnxQuant, Protocol):
    """A format of onnxruntime's MatMulNBits: ``CODE_BITS`` per code, maybe with ``ZERO_POINTS``."""

    CODE_BITS: int
    ZERO_POINTS: bool

    def blocks(self, packed_OP: NDArray[np.uint8], I: int) -> MatMulNBitsBlocks: ...


class Grid(Quant, Protocol):
    """A uniform quantization grid: weights are integer codes times the step of their group.

    ``CODE_RANGE`` are the lowest and the highest code. Code 0 is zero, except in a
    :class:`AsymmetricGrid`; see :func:`signed_code_range`. ``GROUP_SIZE`` weights share a step,
    which is an integer from ``STEP_CODE_RANGE`` times the quant block's scale in half precision.
    ``steps`` returns step_OG, the step of every group, and ``scales`` the scale of every block;
    they are equal if a block is one group.

    Weights on the grid are quantized to themselves; see also :func:`needs_extreme_code`.
    """

    CODE_RANGE: tuple[int, int]
    GROUP_SIZE: int
    STEP_CODE_RANGE: tuple[int, int]

    def steps(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]: ...

    def scales(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]: ...


class AsymmetricGrid(Grid, Protocol):
    """An asymmetric grid, whose groups have a minimum: a weight is step · code − minimum.

    A minimum is an integer from ``MINIMUM_CODE_RANGE`` times ``MINIMUM_SCALE_RATIO`` times the
    block's scale. If it is ``ZERO_CODE`` steps, that code is exactly zero; pruning gives every
    group that minimum to keep zeros.
    """

    MINIMUM_CODE_RANGE: tuple[int, int]
    MINIMUM_SCALE_RATIO: int
    ZERO_CODE: int


def is_asymmetric(grid: Grid) -> bool:
    """Return True for a :class:`AsymmetricGrid`."""
    return hasattr(grid, "MINIMUM_CODE_RANGE")


def signed_code_range(grid: Grid) -> tuple[int, int]:
    """Return the lowest and the highest code, shifted so that code 0 is zero."""
    zero = cast(AsymmetricGrid, grid).ZERO_CODE if is_asymmetric(grid) else 0
    return grid.CODE_RANGE[0] - zero, grid.CODE_RANGE[1] - zero


def needs_extreme_code(grid: Grid) -> bool:
    """Return True if weights on the grid round-trip only with an extreme code in every group.

    That holds if a group is a whole block: without an importance its scale is computed from the
    weight of largest magnitude, which gets the code of largest magnitude.
    """
    return grid.GROUP_SIZE == grid.BLOCK_SIZE


def load_grid(name: str) -> Grid:
    """Import a number format whose codes can be chosen while pruning.

    Raises:
        UsageError: the format has no such codes; it names those of the same file format that do.
    """
    quant = load(name)
    if hasattr(quant, "CODE_RANGE"):
        return cast(Grid, quant)

    grids = []
    for other in plugins.list_names("quant"):
        form = load(other)
        if hasattr(form, "CODE_RANGE") and {*form.FORMATS} & {*quant.FORMATS}:
            grids.append(other)

    raise UsageError(
        "no-optimized-rounding",
        f"the codes of quant {name!r} cannot be chosen while pruning",
        remedy=f"use one of {', '.join(grids)}, or export.rounding = 'nearest'",
    )


def read_ggml_type(name: str) -> tuple[int, float, int]:
    """Return ``GGML_TYPE``, ``BITS`` and ``BLOCK_SIZE`` of ggml's type of that name."""
    known = GGML_TYPES[name]
    return known.type_id, known.bits, known.block_weights


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
    weight_OI: NDArray[np.float32],
    stored_OI: NDArray[np.float32],
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


def explain_misfit(quant: Quant, row_length: int) -> str:
    """Return the reason why a format cannot store rows of that length, or an empty string."""
    if row_length % quant.BLOCK_SIZE == 0:
        return ""
    return f"rows of {row_length} weights do not divide into quant blocks of {quant.BLOCK_SIZE}"
