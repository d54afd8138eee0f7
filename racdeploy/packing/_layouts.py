"""How the block formats of ggml split into heads (scales) and one code a weight.

Codes are taken XOR the code of zero, so a weight whose code means zero is the number zero in every format, and
splitting and joining are exact for any bytes. A code is stored in one or two fields; lanes follow the fields' own
order in the file, which is the same order for every field of a layout.
Source: ggml-common.h, ``block_q4_0`` and following.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["LAYOUTS", "Layout"]

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """One number format.

    Args:
        name: of the quant.
        block_weights: weights of a block.
        block_bytes: its size in the file.
        head_bytes: its bytes that belong to no single weight, in front.
        widths: bits of each field of a code.
        split: from the bytes of blocks behind their heads to one stream of lanes for each field.
        join: the other way.
    """

    name: str
    block_weights: int
    block_bytes: int
    head_bytes: int
    widths: tuple[int, ...]
    split: Callable[[Bytes], list[Bytes]]
    join: Callable[[Sequence[Bytes]], Bytes]

    @property
    def in_words(self) -> bool:
        """Whether four codes are stored as a word (``_buckets.py``), in place of a mask and those that are not zero."""
        return self.widths == (4,)

    @property
    def planes(self) -> int:
        """Planes of a chunk: one for each byte of a head and of a code; of narrower fields, one each."""
        return self.head_bytes + sum(max(1, bits // 8) for bits in self.widths)


def _same(body_BP: Bytes) -> list[Bytes]:
    return [np.ascontiguousarray(body_BP).reshape(-1)]


def _only(fields: Sequence[Bytes]) -> Bytes:
    return fields[0]


def _split_q4_0(body_BP: Bytes) -> list[Bytes]:
    return [(body_BP ^ np.uint8(0x88)).reshape(-1)]  # a nibble of 8 is zero


def _join_q4_0(fields: Sequence[Bytes]) -> Bytes:
    return fields[0] ^ np.uint8(0x88)


def _split_q5_0(body_BP: Bytes) -> list[Bytes]:
    """Bring the high bits, four bytes in front, into the order of the nibbles, which pair weight 0 with 16."""
    low_B2 = np.ascontiguousarray(body_BP[:, :2]).view("<u2")
    high_B2 = np.ascontiguousarray(body_BP[:, 2:4]).view("<u2")
    bits = _spaced()[low_B2] | _spaced()[high_B2] << 1
    return [np.ascontiguousarray(body_BP[:, 4:]).reshape(-1), ~bits.view(np.uint8).reshape(-1)]


def _join_q5_0(fields: Sequence[Bytes]) -> Bytes:
    nibbles, bits = fields
    halves = _separated().take((~bits).view("<u2"), mode="wrap").view("<u4")  # bytes 0, 2, 1, 3 of the high bits
    body_B = np.empty(halves.size, dtype=[("high", "<u4"), ("nibbles", "V16")])
    body_B["high"] = halves & 0xFF0000FF | (halves & 0xFF00) << 8 | halves >> 8 & 0xFF00
    body_B["nibbles"] = nibbles.view("V16")
    return body_B.view(np.uint8)


@cache
def _spaced() -> NDArray[np.uint32]:
    """Return every 16-bit number with a zero bit between its bits."""
    number = np.arange(1 << 16, dtype=np.uint32)
    return np.asarray(sum((number >> bit & 1) << 2 * bit for bit in range(16)), dtype="<u4")


@cache
def _separated() -> NDArray[np.uint16]:
    """Return every 16-bit number with its even bits in the low byte and its odd ones in the high byte."""
    number = np.arange(1 << 16, dtype=np.uint32)
    even = sum((number >> 2 * bit & 1) << bit for bit in range(8))
    odd = sum((number >> 2 * bit + 1 & 1) << bit for bit in range(8))
    return np.asarray(even | odd << 8, dtype="<u2")


LAYOUTS: dict[int, Layout] = {
    0: Layout("f32", 1, 4, 0, (32,), _same, _only),
    1: Layout("f16", 1, 2, 0, (16,), _same, _only),
    2: Layout("q4_0", 32, 18, 2, (4,), _split_q4_0, _join_q4_0),
    6: Layout("q5_0", 32, 22, 2, (4, 1), _split_q5_0, _join_q5_0),
    8: Layout("q8_0", 32, 34, 2, (8,), _same, _only),
    30: Layout("bf16", 1, 2, 0, (16,), _same, _only),
    39: Layout("mxfp4", 32, 17, 1, (4,), _same, _only),
}
"""By ggml's type id."""
