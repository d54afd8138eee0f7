"""Number formats: one file each, numpy in and packed bytes out.

A file has the members of :class:`Quant`. Where ``PRESERVES_ZERO`` is True, zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from racdeploy import plugins
from racdeploy.errors import ModelError, UsageError
from racdeploy.quant.matmulnbits import Blocks
from racdeploy.tensors.ggml_types import GGML_TYPES

IMPORTANCE_FILE = "importance.safetensors"
"""Of a pruned model: the mean squared input of each column, by linear."""
DENSE_IMPORTANCE_FILE = "dense-importance.safetensors"
"""The same for the model that it was cut from, by that one's names and with all its inputs."""


Codes = str | Mapping[str, str]
"""The number format whose codes are chosen while pruning, or linear → one; empty: none are."""


def codes_of(codes: Codes, linear: str) -> str:
    """Return the number format whose codes a linear gets, or an empty string."""
    return codes if isinstance(codes, str) else codes.get(linear, "")


class Quant(Protocol):
    """A number format, as a module.

    ``FORMATS`` are the file formats that store it, ``BITS`` the bits per weight with scales, and
    ``BLOCK`` how many weights of a row share their scales. ``quantize`` takes finite float32
    weight_OI, ``I`` a multiple of ``BLOCK``, and returns packed_OP, ``I * BITS / 8`` bytes a row.
    """

    FORMATS: tuple[str, ...]
    BITS: float
    BLOCK: int
    PRESERVES_ZERO: bool

    def quantize(self, weight_OI: NDArray[np.float32]) -> NDArray[np.uint8]: ...

    def dequantize(self, packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]: ...


class GgmlQuant(Quant, Protocol):
    """A number format of GGUF files; ``GGML_TYPE`` is ggml's type id.

    With importance_I, what the squared error of each input counts, above 0, the scales are chosen
    for the least weighted error; without it the bytes are those that ggml writes.
    """

    GGML_TYPE: int

    def quantize(
        self, weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]: ...


class OnnxQuant(Quant, Protocol):
    """A number format of ONNX graphs; ``JS_DTYPE`` is what transformers.js calls it."""

    JS_DTYPE: str


class BlockQuant(OnnxQuant, Protocol):
    """A number format of MatMulNBits, of CODE_BITS a code; blocks may have ZERO_POINTS."""

    CODE_BITS: int
    ZERO_POINTS: bool

    def blocks(self, packed_OP: NDArray[np.uint8], I: int) -> Blocks: ...


class Grid(Quant, Protocol):
    """A format whose weights are whole codes times the step of their group.

    ``CODES`` are the lowest and the highest code. Zero has the code 0, but for a
    :class:`MinimumGrid`; see :func:`signed_codes`. ``GROUP_SIZE`` weights share a step: a whole
    number, from ``STEP_CODES``, times the scale of the quant block, in half precision. ``steps``
    returns step_OG, the step of every group, and ``scales`` the scale of every block; of a format
    whose blocks are one group they are the same.

    Weights on the grid are quantized to themselves; see also :func:`pins_largest`.
    """

    CODES: tuple[int, int]
    GROUP_SIZE: int
    STEP_CODES: tuple[int, int]

    def steps(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]: ...

    def scales(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]: ...


class MinimumGrid(Grid, Protocol):
    """A grid whose groups have a minimum besides: a weight is step · code − minimum.

    A minimum is a whole number, from ``MINIMA``, of ``MINIMUM_UNITS`` times the scale of the block.
    With a minimum of ``ZERO_CODE`` steps that code is zero, so where zeros are kept, every group
    has that minimum.
    """

    MINIMA: tuple[int, int]
    MINIMUM_UNITS: int
    ZERO_CODE: int


def has_minima(grid: Grid) -> bool:
    """Return whether a grid is a :class:`MinimumGrid`."""
    return hasattr(grid, "MINIMA")


def signed_codes(grid: Grid) -> tuple[int, int]:
    """Return the lowest and the highest code where 0 is zero."""
    zero = cast(MinimumGrid, grid).ZERO_CODE if has_minima(grid) else 0
    return grid.CODES[0] - zero, grid.CODES[1] - zero


def pins_largest(grid: Grid) -> bool:
    """Return whether a format finds weights again only by a largest code in every group.

    So it is where a group has a scale of its own. Without an importance, the weight of largest
    magnitude gets the code of largest magnitude.
    """
    return grid.GROUP_SIZE == grid.BLOCK


def as_grid(name: str) -> Grid:
    """Import a number format whose codes can be chosen while pruning, or refuse it."""
    quant = load(name)
    if hasattr(quant, "CODES"):
        return cast(Grid, quant)

    grids = []
    for other in plugins.names("quant"):
        form = load(other)
        if hasattr(form, "CODES") and {*form.FORMATS} & {*quant.FORMATS}:
            grids.append(other)

    raise UsageError(
        "no-optimized-rounding",
        f"the codes of quant {name!r} cannot be chosen while pruning",
        remedy=f"use one of {', '.join(grids)}, or prune.joint = false",
    )


def read_ggml_type(name: str) -> tuple[int, float, int]:
    """Return ``GGML_TYPE``, ``BITS`` and ``BLOCK`` of a format that ggml has under that name."""
    known = GGML_TYPES[name]
    return known.number, known.bits, known.block_weights


def load_ggml(name: str) -> GgmlQuant:
    """Import the number format of that name, which GGUF stores."""
    return cast(GgmlQuant, plugins.load("quant", name))


def load_onnx(name: str) -> OnnxQuant:
    """Import the number format of that name, which ONNX stores."""
    return cast(OnnxQuant, plugins.load("quant", name))


def load_blocks(name: str) -> BlockQuant:
    """Import the number format of that name, which is one of MatMulNBits."""
    return cast(BlockQuant, plugins.load("quant", name))


def is_blocks(name: str) -> bool:
    """Return whether a number format is one of MatMulNBits."""
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
    """Refuse weights that came out of a number format, stored_OI, infinite or as no numbers.

    ``wider`` are number formats for larger weights, for the message.
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


def fits(quant: Quant, row_length: int) -> str:
    """Return why rows of that many weights cannot be stored in a format, or an empty string."""
    if row_length % quant.BLOCK == 0:
        return ""
    return f"rows of {row_length} weights do not divide into quant blocks of {quant.BLOCK}"
