"""Split blocks of ggml's number formats into heads (scales) and one code a weight, and join them.

Codes are XORed with the code of zero and keep the order of the file. Splitting and joining are
exact for any bytes. Source: ggml-common.h, ``block_q4_0`` and following.
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
"""Maximum weights of a chunk."""


@dataclass(frozen=True)
class BlockLayout:
    """Layout of the blocks of one number format."""

    name: str
    block_weights: int
    block_bytes: int
    head_bytes: int  # in front of a block: its scales, which belong to no single weight
    plane_bits: tuple[int, ...]  # bits of a code in each plane, low ones first
    code_dtype: str  # unsigned numpy type of a code; codes of 4 bits are two a byte, low bits first
    zero_code: int  # codes are XORed with it, so that zero becomes 0

    def count_weights(self, plain_bytes: int) -> int:
        return plain_bytes // self.block_bytes * self.block_weights

    @property
    def uses_words(self) -> bool:
        """True if four codes are stored as a word (``buckets.py``), without a mask."""
        return self.plane_bits == (4,)

    @property
    def has_fifth_bits(self) -> bool:
        """True if a block has the fifth bits of its codes in front of the nibbles."""
        return self.plane_bits == (4, 1)

    @cached_property
    def block_dtype(self) -> np.dtype[Any]:
        """Type of a block in numpy: the bytes of its head, and the rest as one item.

        numpy copies one large item faster than many bytes.
        """
        heads = [(f"head_{number}", np.dtype("u1")) for number in range(self.head_bytes)]
        return np.dtype([*heads, ("body", f"V{self.block_bytes - self.head_bytes}")])

    @property
    def plane_count(self) -> int:
        """Number of planes of a chunk: one for each byte of a head, and those of a code."""
        return self.head_bytes + len(self.plane_bits)

    def split(self, body_GP: Bytes) -> NDArray[Any]:
        """Return the codes of blocks, given the bytes behind their heads."""
        if self.has_fifth_bits:
            return _split_q5_0(body_GP, self.zero_code)
        return self._flip(np.ascontiguousarray(body_GP).reshape(-1)).view(self.code_dtype)

    def join(self, codes: NDArray[Any]) -> Bytes:
        """Return the bytes behind the heads of blocks, given their codes."""
        if self.has_fifth_bits:
            return _join_q5_0(codes, self.zero_code)
        return self._flip(codes.view(np.uint8))

    def _flip(self, body: Bytes) -> Bytes:
        if not self.zero_code:
            return body
        assert self.plane_bits == (4,), "of whole codes only those of two a byte are flipped"
        return body ^ np.uint8(self.zero_code | self.zero_code << 4)


def _split_q5_0(body_GP: Bytes, zero_code: int) -> Bytes:
    """Return the codes of q5_0 blocks, in which a byte of nibbles pairs weights n and n + 16."""
    # The fifth bits of all weights are in front, four bytes a block; bring them to the nibbles.
    high_GS = np.unpackbits(body_GP[:, :4], axis=1, bitorder="little") << 4

    nibbles_GP = body_GP[:, 4:]
    code_GS = np.empty_like(high_GS)

    code_GS[:, ::2] = nibbles_GP & 15 | high_GS[:, :16]
    code_GS[:, 1::2] = nibbles_GP >> 4 | high_GS[:, 16:]
    code_GS ^= np.uint8(zero_code)
    return code_GS.reshape(-1)


def _join_q5_0(codes: Bytes, zero_code: int) -> Bytes:
    """Return the fifth bits and nibbles of q5_0 blocks, as :func:`_split_q5_0` takes them."""
    pair_GS = (codes ^ np.uint8(zero_code)).view("<u2").reshape(-1, 16)  # of weights 0 and 16
    body_GP = np.empty((len(pair_GS), 20), dtype=np.uint8)

    high_GXS = np.stack([pair_GS & 0x0010, pair_GS & 0x1000], axis=1) != 0
    body_GP[:, :4] = np.packbits(high_GXS, bitorder="little").reshape(-1, 4)
    body_GP[:, 4:] = pair_GS & 0x000F | pair_GS >> 4 & 0x00F0
    return body_GP.reshape(-1)


def _describe(name: str, widths: tuple[int, ...], kind: str, zero_code: int = 0) -> BlockLayout:
    """Return the layout of a ggml type whose blocks begin with their scales."""
    _, _, weights, size_bytes = GGML_TYPES[name]
    head_bytes = size_bytes - weights * sum(widths) // 8
    return BlockLayout(
        name=name,
        block_weights=weights,
        block_bytes=size_bytes,
        head_bytes=head_bytes,
        plane_bits=widths,
        code_dtype=kind,
        zero_code=zero_code,
    )


_KNOWN = (
    _describe("f32", (8, 8, 8, 8), "<u4"),
    _describe("f16", (8, 8), "<u2"),
    _describe("q4_0", (4,), "u1", zero_code=8),
    _describe("q5_0", (4, 1), "u1", zero_code=16),
    _describe("q8_0", (8,), "u1"),
    _describe("bf16", (8, 8), "<u2"),
    _describe("mxfp4", (4,), "u1"),
)
BLOCK_LAYOUTS = {GGML_TYPES[layout.name].type_id: layout for layout in _KNOWN}
"""Layouts by ggml's type id."""
