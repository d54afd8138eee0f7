"""MXFP4 as checkpoints and as ggml store it: 32 codes of 4 bits that share a power of two.

A checkpoint has a matrix as two tensors: its codes, two neighbours in a byte, and its exponents.
ggml puts the exponent in front of each block, and the first half of a block in the low nibbles.
Source: OCP Microscaling Formats specification 1.0; ``block_mxfp4`` in ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ModelError
from racdeploy.tensors.safetensors import PackedEntry, TensorEntry

Bytes = NDArray[np.uint8]
BLOCK = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS, _NAN = 127, 255


@dataclass(frozen=True)
class Mxfp4Entry(PackedEntry):
    """A matrix in MXFP4, read as bfloat16, which holds its values exactly.

    Its parts are the codes, 16 bytes for each block of a row, and the exponents, one byte each.
    """

    @classmethod
    def from_parts(cls, codes: TensorEntry, exponents: TensorEntry) -> Mxfp4Entry:
        """Return the matrix of these codes and exponents, each of shape [rows, blocks, …]."""
        O, G, _ = codes.shape
        return cls(
            codes.file,
            start=codes.start,
            stop=codes.stop,
            dtype="BF16",
            shape=(O, G * BLOCK),
            parts=(codes, exponents),
            packed_quant="mxfp4",
        )

    def read(self) -> NDArray[np.uint16]:
        return to_bfloat16(*self._read_parts())

    def read_packed(self) -> Bytes:
        return to_ggml_rows(*self._read_parts())

    def _read_parts(self) -> tuple[Bytes, Bytes]:
        code_OGP, exponent_OG = (part.read() for part in self.parts)
        if (exponent_OG == _NAN).any():
            raise ModelError(
                "weights-not-finite",
                f"{self.file}: some MXFP4 weights are NaN",
                remedy="copy or download the model again",
            )
        return code_OGP, exponent_OG


def _tabulate() -> NDArray[np.uint32]:
    """Return a table by exponent and byte: the bfloat16 bits of both codes, the first one low."""
    code_X = np.array([*_MAGNITUDES, *(-size for size in _MAGNITUDES)])
    exponent_Y1 = np.arange(_NAN)[:, None] - _BIAS

    with np.errstate(over="ignore"):  # the largest overflow in bfloat16, too
        value_YX = np.ldexp(code_X, exponent_Y1).astype(np.float32)
    bits_YX = value_YX.view(np.uint32) >> 16

    byte_Z = np.arange(256)
    low_YZ = bits_YX[:, byte_Z & 15]
    high_YZ = bits_YX[:, byte_Z >> 4]
    pair_YZ: NDArray[np.uint32] = low_YZ | high_YZ << 16
    return pair_YZ.astype("<u4").reshape(-1)


_PAIRS = _tabulate()


def to_bfloat16(code_OGP: Bytes, exponent_OG: Bytes) -> NDArray[np.uint16]:
    """Return the values of a matrix as bfloat16 bits, 32 a block."""
    index_OGP = exponent_OG[..., None].astype(np.uint16) << 8 | code_OGP
    bits_OGX: NDArray[np.uint16] = _PAIRS[index_OGP].view(np.uint16)
    return bits_OGX.reshape(len(code_OGP), -1)


def to_ggml_rows(code_OGP: Bytes, exponent_OG: Bytes) -> Bytes:
    """Return the codes and exponents of a matrix as rows of ggml blocks, packed_OP."""
    O, G, P = code_OGP.shape
    # The checkpoint pairs weights 2n and 2n + 1 in a byte, ggml weights n and n + 16.
    first_OGX, second_OGX = np.split(code_OGP, 2, axis=-1)

    packed_OGP = np.empty((O, G, 1 + P), np.uint8)
    packed_OGP[..., 0] = exponent_OG
    packed_OGP[..., 1::2] = first_OGX & 15 | second_OGX << 4
    packed_OGP[..., 2::2] = first_OGX >> 4 | second_OGX & 240
    return packed_OGP.reshape(O, -1)
