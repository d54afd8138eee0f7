"""Number formats: one file each, numpy in and packed bytes out.

A file holds the members of :class:`Quant`. Packed bytes are exactly what an exported file stores,
and ``PRESERVES_ZERO`` is a promise that the contract test holds against the engine's own code:
where it is True, a weight that is zero is zero after the round trip, so pruning survives.
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from racdeploy import plugins
from racdeploy.errors import ModelError, UsageError
from racdeploy.quant.matmulnbits import Blocks

__all__ = [
    "IMPORTANCE_FILE",
    "BlockQuant",
    "GgmlQuant",
    "Grid",
    "OnnxQuant",
    "Quant",
    "as_grid",
    "check_finite",
    "fits",
    "is_blocks",
    "join_blocks",
    "read_leading_scales",
    "load",
    "load_blocks",
    "load_ggml",
    "load_onnx",
    "pair_nibbles",
]


IMPORTANCE_FILE = "importance.safetensors"
"""Of a pruned model: the mean squared input of each column, by linear."""


class Quant(Protocol):
    """A number format, as a module.

    ``FORMATS`` are the file formats that store it; one of gguf's has ``GGML_TYPE``, ggml's type id,
    see :class:`GgmlQuant`. ``BITS`` are the bits per weight with scales, ``BLOCK`` how many weights
    of a row share their scales. ``quantize`` takes finite float32 weight_OI with ``I`` a multiple
    of ``BLOCK`` and returns packed_OP, ``I * BITS / 8`` bytes a row; ``dequantize`` returns float32
    weight_OI.
    """

    FORMATS: tuple[str, ...]
    BITS: float
    BLOCK: int
    PRESERVES_ZERO: bool

    def quantize(self, weight_OI: NDArray[np.float32]) -> NDArray[np.uint8]: ...

    def dequantize(self, packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]: ...


class GgmlQuant(Quant, Protocol):
    """A number format of GGUF files; ``GGML_TYPE`` is ggml's type id.

    With importance_I, what the squared error of each input counts, above 0, the scales of a block
    are chosen for the least weighted error; without it the bytes are those that ggml writes.
    """

    GGML_TYPE: int

    def quantize(
        self, weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]: ...


class OnnxQuant(Quant, Protocol):
    """A number format of ONNX graphs; ``JS_DTYPE`` is what transformers.js calls it."""

    JS_DTYPE: str


class BlockQuant(OnnxQuant, Protocol):
    """A number format of MatMulNBits.

    ``CODE_BITS`` are those of a code; ``ZERO_POINTS`` is True where every block has a zero point,
    and not the middle code. ``blocks`` returns what the operator takes.
    """

    CODE_BITS: int
    ZERO_POINTS: bool

    def blocks(self, packed_OP: NDArray[np.uint8], I: int) -> Blocks: ...


class Grid(Quant, Protocol):
    """A format whose weights are whole codes times one scale per block; zero has the code 0.

    ``CODES`` are the lowest and the highest code, as a weight counts them and not as a file stores
    them; ``steps`` returns step_OG, the scale of every block, float32. Without an importance,
    ``quantize`` takes the scale from the weight of largest magnitude, which gets the code of
    largest magnitude.
    """

    CODES: tuple[int, int]

    def steps(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]: ...


def as_grid(name: str) -> Grid:
    """Import a number format whose codes can be chosen while pruning.

    Raises:
        UsageError: the format is no such grid; the message names those that are.
    """
    quant = load(name)
    if not hasattr(quant, "CODES"):
        others = {other: load(other) for other in plugins.names("quant")}
        grids = [
            other
            for other, form in others.items()
            if hasattr(form, "CODES") and {*form.FORMATS} & {*quant.FORMATS}
        ]
        raise UsageError(
            f"the codes of quant {name!r} cannot be chosen while pruning",
            remedy=f"use one of {', '.join(grids)}, or prune.joint = false",
        )
    return cast(Grid, quant)


def read_leading_scales(packed_OP: NDArray[np.uint8], block_bytes: int) -> NDArray[np.float32]:
    """Return step_OG of a format whose blocks begin with a scale in half precision."""
    packed_OGP = packed_OP.reshape(len(packed_OP), -1, block_bytes)
    scale_OG2 = np.ascontiguousarray(packed_OGP[:, :, :2])
    return scale_OG2.view(np.float16)[:, :, 0].astype(np.float32)


def pair_nibbles(code_GS: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return four-bit codes two a byte, as ggml pairs them: a block's first half is low."""
    low, high = np.split(code_GS, 2, axis=-1)
    return low | high << np.uint8(4)


def join_blocks(step_OG: NDArray[np.float16], *fields_OGP: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return packed_OP of blocks that are a scale in half precision and then some bytes."""
    O, G = step_OG.shape
    scale_OG2 = np.ascontiguousarray(step_OG, dtype="<f2").view(np.uint8).reshape(O, G, 2)
    return np.concatenate([scale_OG2, *fields_OGP], axis=-1).reshape(O, -1)


def load_ggml(name: str) -> GgmlQuant:
    """Import the number format of that name; the caller knows that GGUF stores it."""
    return cast(GgmlQuant, plugins.load("quant", name))


def load_onnx(name: str) -> OnnxQuant:
    """Import the number format of that name; the caller knows that ONNX stores it."""
    return cast(OnnxQuant, plugins.load("quant", name))


def load_blocks(name: str) -> BlockQuant:
    """Import the number format of that name; the caller knows that it is one of MatMulNBits."""
    return cast(BlockQuant, plugins.load("quant", name))


def is_blocks(name: str) -> bool:
    """Return whether a number format is one of MatMulNBits."""
    return hasattr(load(name), "blocks")


def load(name: str) -> Quant:
    """Import the number format of that name.

    Raises:
        UnknownPluginError: there is no such format.
        MissingExtraError: it needs an optional dependency.
    """
    return cast(Quant, plugins.load("quant", name))


def check_finite(
    name: str,
    quant: str,
    weight_OI: NDArray[np.float32],
    stored_OI: NDArray[np.float32],
    wider: str,
) -> None:
    """Refuse weights that came out of a number format infinite or as no numbers.

    Args:
        weight_OI: before rounding.
        stored_OI: after the round trip.
        wider: number formats for larger weights, for the message.

    Raises:
        ModelError: the checkpoint's weights are not finite, or too large for the format.
    """
    if np.isfinite(stored_OI).all():
        return
    if np.isfinite(weight_OI).all():
        raise ModelError(
            f"{name!r} has weights up to {float(np.abs(weight_OI).max()):g}, too large for {quant}",
            remedy=f"export with quant {wider}",
        )
    raise ModelError(
        f"{name!r} holds weights that are infinite or not a number",
        remedy="the checkpoint is damaged or its training diverged",
    )


def fits(quant: Quant, row_length: int) -> str:
    """Return why rows of that many weights cannot be stored in a format, or an empty string."""
    if row_length % quant.BLOCK == 0:
        return ""
    return f"rows of {row_length} weights do not divide into quant blocks of {quant.BLOCK}"
