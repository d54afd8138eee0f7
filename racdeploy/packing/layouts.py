"""How the block formats of ggml split into heads (scales) and one code a weight.

Codes are taken XOR the code of zero, so a weight whose code means zero is the number zero in every
format, and splitting and joining are exact for any bytes. Codes follow one another as the file has
them. Source: ggml-common.h, ``block_q4_0`` and following.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.packing.bits import Bytes
from racdeploy.storage.ggml_types import GGML_TYPES

CHUNK_WEIGHTS = 262144
"""Most weights of a chunk."""


def join_numbers(codes: NDArray[Any]) -> tuple[Bytes, ...]:
    """Return the only part of a body whose codes are as the file has them."""
    return (codes.view(np.uint8),)


@dataclass(frozen=True)
class Layout:
    """One number format.

    Args:
        head_bytes: bytes of a block that belong to no single weight, in front.
        widths: bits of each field of a code, low ones first.
        split: from the bytes of blocks behind their heads to codes, an unsigned number each; two a
            byte, low bits first, where they have four bits.
        parts: bytes of each part of a body.
        zero: what words of codes are XORed with, nibble by nibble, before they are joined.
        join: the other way, to the parts of a body, where codes do not have five bits.
    """

    name: str
    block_weights: int
    block_bytes: int
    head_bytes: int
    widths: tuple[int, ...]
    split: Callable[[Bytes], NDArray[Any]]
    parts: tuple[int, ...]
    zero: int = 0
    join: Callable[[NDArray[Any]], tuple[Bytes, ...]] = join_numbers

    @property
    def chunk_bytes(self) -> int:
        return CHUNK_WEIGHTS // self.block_weights * self.block_bytes

    def count_weights(self, plain_bytes: int) -> int:
        return plain_bytes // self.block_bytes * self.block_weights

    @property
    def in_words(self) -> bool:
        """Whether four codes are stored as a word (``buckets.py``), without a mask."""
        return self.widths == (4,)

    @cached_property
    def in_fives(self) -> bool:
        """Whether codes have five bits, which ``fives.py`` puts in their places."""
        return self.widths == (4, 1)

    @cached_property
    def fields(self) -> list[tuple[str, np.dtype[Any]]]:
        """Names and types of the fields of a block: the bytes of its head, the parts of its body.

        numpy copies a part as one item, several times as fast as a row of bytes.
        """
        kinds = ["u1"] * self.head_bytes
        kinds += [f"V{count}" for count in self.parts]
        return [(f"part_{number}", np.dtype(kind)) for number, kind in enumerate(kinds)]

    @cached_property
    def block(self) -> np.dtype[Any]:
        return np.dtype(self.fields)

    @cached_property
    def planes(self) -> int:
        """Planes of a chunk: one for each byte of a head and of a code, and each narrower field."""
        return self.head_bytes + sum(max(1, bits // 8) for bits in self.widths)


def _split_numbers(kind: str) -> Callable[[Bytes], NDArray[Any]]:
    return lambda body_GP: np.ascontiguousarray(body_GP).reshape(-1).view(kind)


def _split_q4_0(body_GP: Bytes) -> Bytes:
    middle = np.uint8(0x88)  # a nibble of 8 is zero
    return (body_GP ^ middle).reshape(-1)


def _split_q5_0(body_GP: Bytes) -> Bytes:
    """Bring the high bits, four bytes in front, to the nibbles: a byte pairs weights 0 and 16."""
    high_GS = np.unpackbits(body_GP[:, :4], axis=1, bitorder="little") << 4
    high_GS ^= np.uint8(16)  # a code of 16 is zero

    nibbles_GP = body_GP[:, 4:]
    code_GS = np.empty_like(high_GS)

    code_GS[:, ::2] = nibbles_GP & 15 | high_GS[:, :16]
    code_GS[:, 1::2] = nibbles_GP >> 4 | high_GS[:, 16:]
    return code_GS.reshape(-1)


def _describe(
    name: str, widths: tuple[int, ...], split: Callable[[Bytes], NDArray[Any]], zero: int = 0
) -> Layout:
    """Return the layout of a format in which the head of a block is in front of its codes."""
    _, weights, size_bytes = GGML_TYPES[name]
    body_bytes = weights * sum(widths) // 8
    parts = tuple(weights * bits // 8 for bits in reversed(widths))  # fifth bits are in front
    return Layout(
        name, weights, size_bytes, size_bytes - body_bytes, widths, split, parts=parts, zero=zero
    )


_KNOWN = (
    _describe("f32", (32,), _split_numbers("<u4")),
    _describe("f16", (16,), _split_numbers("<u2")),
    _describe("q4_0", (4,), _split_q4_0, zero=8),
    _describe("q5_0", (4, 1), _split_q5_0),
    _describe("q8_0", (8,), _split_numbers("u1")),
    _describe("bf16", (16,), _split_numbers("<u2")),
    _describe("mxfp4", (4,), _split_numbers("u1")),
)
LAYOUTS = {GGML_TYPES[layout.name].number: layout for layout in _KNOWN}
"""By ggml's type id."""
