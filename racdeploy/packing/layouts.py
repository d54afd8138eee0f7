"""How the block formats of ggml split into heads (scales) and one code a weight.

Codes are taken XOR the code of zero, so a weight whose code means zero is the number zero in every format, and
splitting and joining are exact for any bytes. Codes follow one another as the file has them.
Source: ggml-common.h, ``block_q4_0`` and following.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """One number format.

    Args:
        name: of the quant.
        block_weights: weights of a block.
        block_bytes: its size in the file.
        head_bytes: its bytes that belong to no single weight, in front.
        widths: bits of each field of a code, low ones first.
        split: from the bytes of blocks behind their heads to codes, an unsigned number each; two a byte, low bits
            first, where they have four bits.
        join: the other way, to the parts of a body.
        parts: bytes of each part of a body.
        zero: what words of codes are XORed with, nibble by nibble, before they are joined.
    """

    name: str
    block_weights: int
    block_bytes: int
    head_bytes: int
    widths: tuple[int, ...]
    split: Callable[[Bytes], NDArray[Any]]
    join: Callable[[Any], tuple[Bytes, ...]]
    parts: tuple[int, ...]
    zero: int = 0

    @property
    def in_words(self) -> bool:
        """Whether four codes are stored as a word (``_buckets.py``), in place of a mask and those that are not zero."""
        return self.widths == (4,)

    @cached_property
    def in_fives(self) -> bool:
        """Whether codes have five bits, which ``_fives.py`` puts in their places."""
        return self.widths == (4, 1)

    @cached_property
    def fields(self) -> list[tuple[str, np.dtype[Any]]]:
        """Names and types of the fields of a block of the file: the bytes of its head, then the parts of its body.

        numpy copies a part as one item, several times as fast as a row of bytes.
        """
        kinds = ["u1"] * self.head_bytes + [f"V{count}" for count in self.parts]
        return [(f"part_{number}", np.dtype(kind)) for number, kind in enumerate(kinds)]

    @cached_property
    def block(self) -> np.dtype[Any]:
        """A block of the file."""
        return np.dtype(self.fields)

    @cached_property
    def planes(self) -> int:
        """Planes of a chunk: one for each byte of a head and of a code; of narrower fields, one each."""
        return self.head_bytes + sum(max(1, bits // 8) for bits in self.widths)


def _numbers(kind: str) -> Callable[[Bytes], NDArray[Any]]:
    return lambda body_BP: np.ascontiguousarray(body_BP).reshape(-1).view(kind)


def _bytes(codes: NDArray[Any]) -> tuple[Bytes]:
    return (codes.view(np.uint8),)


def _split_q4_0(body_BP: Bytes) -> Bytes:
    return (body_BP ^ np.uint8(0x88)).reshape(-1)  # a nibble of 8 is zero


def _split_q5_0(body_BP: Bytes) -> Bytes:
    """Bring the high bits, four bytes in front, to the nibbles, of which a byte pairs weight 0 with 16."""
    high_BS = np.unpackbits(body_BP[:, :4], axis=1, bitorder="little") << 4 ^ np.uint8(16)
    code_BS = np.empty_like(high_BS)
    code_BS[:, ::2] = body_BP[:, 4:] & 15 | high_BS[:, :16]
    code_BS[:, 1::2] = body_BP[:, 4:] >> 4 | high_BS[:, 16:]
    return code_BS.reshape(-1)


def _parts(parts: tuple[Bytes, Bytes]) -> tuple[Bytes, Bytes]:
    return parts  # ``_fives.py`` gives them as the file has them


LAYOUTS: dict[int, Layout] = {
    0: Layout("f32", 1, 4, 0, (32,), _numbers("<u4"), _bytes, (4,)),
    1: Layout("f16", 1, 2, 0, (16,), _numbers("<u2"), _bytes, (2,)),
    2: Layout("q4_0", 32, 18, 2, (4,), _split_q4_0, _bytes, (16,), 8),
    6: Layout("q5_0", 32, 22, 2, (4, 1), _split_q5_0, _parts, (4, 16)),
    8: Layout("q8_0", 32, 34, 2, (8,), _numbers("u1"), _bytes, (32,)),
    30: Layout("bf16", 1, 2, 0, (16,), _numbers("<u2"), _bytes, (2,)),
    39: Layout("mxfp4", 32, 17, 1, (4,), _numbers("u1"), _bytes, (16,)),
}
"""By ggml's type id."""
