"""How the block formats of ggml split into heads (scales) and one code a weight.

Codes are taken XOR the code of zero, in the order of the file; splitting and joining are exact for
any bytes. Source: ggml-common.h, ``block_q4_0`` and following.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.tensors.ggml_types import GGML_TYPES

Bytes = NDArray[np.uint8]
CHUNK_WEIGHTS = 262144
"""Most weights of a chunk."""


@dataclass(frozen=True)
class Layout:
    """One number format."""

    name: str
    block_weights: int
    block_bytes: int
    head_bytes: int  # of a block, in front, that belong to no single weight
    widths: tuple[int, ...]  # bits that a code has in each plane, low ones first
    kind: str  # unsigned type of a code; of four bits, two a byte, low bits first
    flip: int = 0  # what every byte of a body is XORed with, so that the code of zero becomes 0

    @property
    def chunk_bytes(self) -> int:
        return CHUNK_WEIGHTS // self.block_weights * self.block_bytes

    def count_weights(self, plain_bytes: int) -> int:
        return plain_bytes // self.block_bytes * self.block_weights

    @property
    def in_words(self) -> bool:
        """Whether four codes are stored as a word (``buckets.py``), without a mask."""
        return self.widths == (4,)

    @property
    def has_fifth_bits(self) -> bool:
        """Whether a block has the fifth bits of its codes in front of the nibbles."""
        return self.widths == (4, 1)

    @cached_property
    def block(self) -> np.dtype[Any]:
        """A block: the bytes of its head, and its body as one item, which numpy copies fastest."""
        heads = [(f"head_{number}", np.dtype("u1")) for number in range(self.head_bytes)]
        return np.dtype([*heads, ("body", f"V{self.block_bytes - self.head_bytes}")])

    @property
    def planes(self) -> int:
        """Planes of a chunk: one for each byte of a head, and those of a code."""
        return self.head_bytes + len(self.widths)

    def split(self, body_GP: Bytes) -> NDArray[Any]:
        """Return the codes of blocks, given what is behind their heads."""
        if self.has_fifth_bits:
            return _split_q5_0(body_GP)
        return self._flip(np.ascontiguousarray(body_GP).reshape(-1)).view(self.kind)

    def join(self, codes: NDArray[Any]) -> Bytes:
        """Return what is behind the heads of blocks, given their codes."""
        if self.has_fifth_bits:
            return _join_q5_0(codes)
        return self._flip(codes.view(np.uint8))

    def _flip(self, body: Bytes) -> Bytes:
        return body ^ np.uint8(self.flip) if self.flip else body


def _split_q5_0(body_GP: Bytes) -> Bytes:
    """Bring the high bits, four bytes in front, to the nibbles: a byte pairs weights 0 and 16."""
    high_GS = np.unpackbits(body_GP[:, :4], axis=1, bitorder="little") << 4
    high_GS ^= np.uint8(16)  # a code of 16 is zero

    nibbles_GP = body_GP[:, 4:]
    code_GS = np.empty_like(high_GS)

    code_GS[:, ::2] = nibbles_GP & 15 | high_GS[:, :16]
    code_GS[:, 1::2] = nibbles_GP >> 4 | high_GS[:, 16:]
    return code_GS.reshape(-1)


def _join_q5_0(codes: Bytes) -> Bytes:
    """Return the high bits and nibbles of blocks, as :func:`_split_q5_0` takes them."""
    pair_GS = codes.view("<u2").reshape(-1, 16) ^ np.uint16(0x1010)  # of weights 0 and 16
    body_GP = np.empty((len(pair_GS), 20), dtype=np.uint8)

    high_GXS = np.stack([pair_GS & 0x0010, pair_GS & 0x1000], axis=1) != 0
    body_GP[:, :4] = np.packbits(high_GXS, bitorder="little").reshape(-1, 4)
    body_GP[:, 4:] = pair_GS & 0x000F | pair_GS >> 4 & 0x00F0
    return body_GP.reshape(-1)


def _describe(name: str, widths: tuple[int, ...], kind: str, flip: int = 0) -> Layout:
    """Return the layout of a format in which the head of a block is in front of its codes."""
    _, weights, size_bytes = GGML_TYPES[name]
    head_bytes = size_bytes - weights * sum(widths) // 8
    return Layout(name, weights, size_bytes, head_bytes, widths, kind, flip)


_KNOWN = (
    _describe("f32", (8, 8, 8, 8), "<u4"),
    _describe("f16", (8, 8), "<u2"),
    _describe("q4_0", (4,), "u1", flip=0x88),  # a nibble of 8 is zero
    _describe("q5_0", (4, 1), "u1"),
    _describe("q8_0", (8,), "u1"),
    _describe("bf16", (8, 8), "<u2"),
    _describe("mxfp4", (4,), "u1"),
)
LAYOUTS = {GGML_TYPES[layout.name].number: layout for layout in _KNOWN}
"""By ggml's type id."""
